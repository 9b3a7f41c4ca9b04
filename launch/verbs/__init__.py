"""One module per family of verbs: SUMMARY, and run(arguments) -> exit code."""
