"""The jobs that are one program rather than ranks: preprocess, targets, evaluate. One module each, see `Program`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

NAMES = ("preprocess", "targets", "evaluate")
"""The programs, each also a command and a module of this package."""


class Program(Protocol):
    """A module of this package."""

    CONFIG: type[Any]
    """Its config, without where it runs."""

    def work(self, config: Any) -> None:
        """Does the job and prints the result. Raises ConfigError, ValueError or OSError."""
        ...

    def made_from(self, config: Any) -> Mapping[str, str]:
        """Returns fingerprints of what goes in besides the config, by name."""
        ...

    def made(self, config: Any) -> Mapping[str, str]:
        """Returns fingerprints of what came out, from reading it again; empty where it is not whole."""
        ...

    def preview(self, config: Any) -> None:
        """Prints what a dry run can report beyond the command that would be started."""
        ...


def program(name: str) -> Program:
    """Returns the program of that name.

    Raises:
        ValueError: There is no such program.
    """
    if name not in NAMES:
        raise ValueError(f"there is no program {name!r}; there are: {', '.join(NAMES)}")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module  # type: ignore[no-any-return]
