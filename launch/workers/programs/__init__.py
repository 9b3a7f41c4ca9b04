"""Jobs that are a single program instead of ranks: preprocess, targets, evaluate. One module each, see `Program`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

NAMES = ("preprocess", "targets", "evaluate")
"""The programs; each is also a command, and a module of this package."""


C = TypeVar("C")


class Program(Protocol[C]):
    """Interface of the modules of this package."""

    CONFIG: type[C]
    """Config of the program, without its launcher."""

    def work(self, config: C) -> None:
        """Runs the job and prints the result. Raises ConfigError, ValueError or OSError."""
        ...

    def made_from(self, config: C) -> Mapping[str, str]:
        """Returns fingerprints of all input apart from the config, by name."""
        ...

    def made(self, config: C) -> Mapping[str, str]:
        """Reads the output and returns its fingerprints, by name; empty if it is incomplete."""
        ...

    def preview(self, config: C) -> None:
        """Prints the information of a dry run, in addition to the command that would be started."""
        ...


def program(name: str) -> Program[Any]:
    """Returns the program of that name; its config is one of `CONFIG`, as `launch.workers.task.read` loads it.

    Raises:
        ValueError: There is no such program.
    """
    if name not in NAMES:
        raise ValueError(f"there is no program {name!r}; there are: {', '.join(NAMES)}")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module  # type: ignore[no-any-return]
