"""An argparse parser that raises its errors as ConfigError (exit code 2) with the nearest name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NoReturn

from data_pipeline.core.schema import ConfigError, hint
from launch.cli.width import columns


class Help(argparse.HelpFormatter):
    """Wraps help as the overview of all commands is wrapped, whatever COLUMNS is where the output is piped."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)


class Parser(argparse.ArgumentParser):
    """Parses the arguments of commands without a composed config."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        return Help(self.prog)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with the nearest name of a wrong subcommand or option."""
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        word = (wrong[1] or wrong[2]) if wrong else ""
        near = hint(word.partition("=")[0], _words(self)) if word else ""
        raise ConfigError(f"{message}{near}; {self.prog} --help lists all")


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the options and subcommands of a parser and of the parsers below it."""
    for action in parser._actions:
        yield from action.option_strings
        if action.option_strings and action.choices:
            yield from map(str, action.choices)
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices
            for below in action.choices.values():
                yield from _words(below)
