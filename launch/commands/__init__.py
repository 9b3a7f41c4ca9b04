"""One module per command; each defines run(arguments) -> exit code."""
