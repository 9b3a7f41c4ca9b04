"""Live progress in the terminal: files, hours, hours per second, time left, rejected files and segments."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.preprocess.plan_file import PlannedUnit
from data_pipeline.preprocess.unit_worker import UnitResult

WIDE = 100
"""Columns of a terminal that has space for a bar beside the figures."""


@contextlib.contextmanager
def live_progress(
    todo: Sequence[PlannedUnit], show: bool, console: Console | None = None
) -> Iterator[Callable[[UnitResult], None]]:
    """Shows a progress bar in the block and provides the function that advances it; nothing is drawn unless `show`."""
    weights = {unit.name: unit.seconds or 1.0 for unit in todo}
    console = console or Console(stderr=True)
    columns = (
        *([BarColumn(20)] if console.width >= WIDE else []),
        TaskProgressColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    began = time.monotonic()
    files = rejects = 0
    hours = 0.0
    # the bar advances by expected seconds of audio, which are more even than units
    with Progress(*columns, console=console, disable=not show, transient=False) as bar:
        task = bar.add_task("", total=round(sum(weights.values())), state="starting Ray")

        def advance(result: UnitResult) -> None:
            nonlocal files, rejects, hours
            record = result.record
            files += record.files
            rejects += sum(record.rejects.values())
            hours += sum(row[5] for row in record.flow if row[2] == "in") / SAMPLE_RATE / 3600
            speed = 3600 * hours / max(time.monotonic() - began, 1e-9)
            shown = f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"
            state = f"{files:,} files · {shown} h · {speed:,.0f} × real time · {rejects:,} rejected"
            bar.update(task, advance=weights.get(record.unit, 0.0), state=state)

        yield advance
