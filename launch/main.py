"""The `auricle` program: runs a command and reports errors as one paragraph and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence

from launch.cli.command_table import COMMANDS, CONTINUE, FIRST_WORDS
from launch.cli.signals import kept_interrupts
from launch.cli.width import columns
from launch.exit_codes import ExitCode

SHOWS_ONLY = frozenset({"-h", "--help", "--cfg", "--prepare"})
"""Arguments with which a command prints something for other programs or readers, and starts no work."""


NOTES = (
    "`auricle COMMAND --help` lists every field of that command with its meaning, default and limits; "
    "`auricle COMMAND ... --cfg` prints the composed config and does nothing else.",
    "Every command takes plugins=FOLDER and recipes=FOLDER, with plug-ins and experiments of your own.",
    "Exit codes: 0 done, 1 the work failed, 2 the command or config is wrong, 3 the run is unhealthy, "
    "4 a newer start of the run took over, 130 stopped with Ctrl-C.",
)
"""Last lines of the list of commands."""
DISTRIBUTIONS = {"flashlight": "flashlight-text", "sklearn": "scikit-learn"}
"""Module that some commands import -> the package with it, where they have different names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        arguments: The command and its arguments; by default those of this process.

    Returns:
        The exit code, see launch.exit_codes.
    """
    if arguments is None:
        _use_utf8()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:  # `auricle help runs` is `auricle runs --help`
        given = [given[1], "--help"] if len(given) > 1 and not given[1].startswith("-") else ["--help"]
    if not given or given[0] in ("-h", "--help"):
        with contextlib.suppress(BrokenPipeError):  # `auricle | head`
            print(_overview(), flush=True)
        return ExitCode.DONE if given else ExitCode.USAGE
    if given[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"auricle {version('auricle')}")
        return ExitCode.DONE
    if given[0] not in COMMANDS:
        from data_pipeline.core.schema import did_you_mean, suggest

        near = suggest(given[0], COMMANDS)
        hint = did_you_mean(f"`auricle {near}`" if near else "")
        return _fail(f"there is no command {given[0]!r}{hint}; there are: {', '.join(COMMANDS)}", ExitCode.USAGE)
    return _guarded(given[0], given[1:])


def _use_utf8() -> None:
    """Makes this process and its children read and write UTF-8, regardless of the locale.

    File names, manifests and messages are UTF-8. If the locale has another encoding, Python is restarted in UTF-8 mode
    (PEP 540). Characters that the terminal cannot show are printed as escapes.
    """
    mode = os.environ.get("PYTHONUTF8")
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() != "utf-8" and mode != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os.environ.setdefault("PYTHONUTF8", "1")
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _guarded(command: str, arguments: list[str]) -> int:
    """Runs a command and reports its errors; with AURICLE_DEBUG=1 exceptions are raised with their traceback."""
    debug = os.environ.get("AURICLE_DEBUG", "0") not in ("", "0")
    if command in FIRST_WORDS and not SHOWS_ONLY & set(arguments):
        print(f"auricle {command}: {FIRST_WORDS[command]}", file=sys.stderr, flush=True)
    try:
        if any("=" in argument for argument in arguments):
            from launch.cli.outside import take_outside

            arguments = take_outside(arguments)
        with kept_interrupts():
            module = importlib.import_module(f"launch.commands.{COMMANDS[command][0]}")
            code: int = module.run(arguments)
        return code
    except KeyboardInterrupt:
        left = CONTINUE.get(command, "give the command again")
        return _fail(f"auricle {command}: stopped; {left}", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:
        if debug:
            raise
        from data_pipeline.core.schema import ConfigError

        if isinstance(error, ConfigError):
            return _fail(f"auricle {command}: {error}", ExitCode.USAGE)
        if isinstance(error, ModuleNotFoundError) and error.name:
            top = error.name.partition(".")[0]
            package = DISTRIBUTIONS.get(top, top)
            return _fail(f"auricle {command}: needs the package {package}: pip install {package}", ExitCode.FAILED)
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return _fail(f"auricle {command}: {kind}{error}\n(AURICLE_DEBUG=1 prints the traceback)", ExitCode.FAILED)


def _fail(message: str, code: int) -> int:
    """Prints a message on stderr, with control characters escaped; returns `code`."""
    from data_pipeline.core.text import visible

    sys.stdout.flush()
    print(visible(message, keep="\n"), file=sys.stderr)
    return code


def _overview() -> str:
    """Returns the list of commands, wrapped to the width of help."""
    width = columns()
    indent = 4 + max(map(len, COMMANDS))

    def wrapped(text: str, first: str = "", rest: str = "") -> str:
        return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)

    listed = [
        wrapped(summary, f"  {command:<{indent - 2}}", " " * indent) for command, (_, summary) in COMMANDS.items()
    ]
    return "\n".join(
        [
            "auricle: raw speech -> shards -> a self-supervised checkpoint",
            "",
            "usage: auricle COMMAND [field=value | group=choice] ...",
            "",
            *listed,
            "",
            *map(wrapped, NOTES),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
