"""Progress of work in stages: a bar per stage on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[Any], None]
"""Counts one finished part; its result is not used."""
Begin = Callable[[str, int], Advance]
"""Begins a stage of a number of parts; returns the function that counts one."""


def silent(stage: str, parts: int) -> Advance:
    """Begins a stage without showing it."""
    return lambda result: None


@contextlib.contextmanager
def stages(console: Console | None = None) -> Iterator[Begin]:
    """Shows stages of work on stderr while the block runs; provides the function that begins one."""
    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:

        def announce(stage: str, parts: int) -> Advance:
            console.print(f"{stage} ({parts:,})", soft_wrap=True, markup=False)
            return silent(stage, parts)

        yield announce
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def begin(stage: str, parts: int) -> Advance:
            bar.reset(task, description=stage, total=parts)
            return lambda result: bar.advance(task)

        yield begin
