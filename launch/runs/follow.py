"""Shows the progress of a run from its metrics.jsonl."""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_pipeline.core.jsonl import Tail
from launch.runs.summary import number

PLAIN_EVERY = 15.0
"""Seconds between lines if the output is not a terminal."""
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 16
"""Width of the loss curve in characters."""
RECENT = 50
"""Number of rows from which the remaining time is estimated."""
LONGEST_SECONDS = 1e9
"""Upper limit of the estimate."""


class Follower:
    """Reads a run's metrics.jsonl while the run writes it."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder / "metrics.jsonl")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows read so far."""
        return self._tail.rows

    def read(self) -> dict[str, Any] | None:
        """Reads new rows and returns the newest row, if any; reads the whole file again after a resume replaced it."""
        self._tail.read()
        return self.rows[-1] if self.rows else None


def follow(folder: Path, steps: int, running: Callable[[], bool], console: Console | None = None) -> Follower:
    """Shows progress until `running` returns False; returns the rows read."""
    console = console or Console(stderr=True)
    follower = Follower(folder)
    if console.is_terminal:
        _bar(follower, steps, running, console)
    else:
        _lines(follower, steps, running, console)
    return follower


def _bar(follower: Follower, steps: int, running: Callable[[], bool], console: Console) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting the ranks", total=steps, left="")
        while running():
            row = follower.read()
            if row:
                said = f"{describe(row)}  {sparkline(losses(follower.rows))}"
                bar.update(
                    task,
                    completed=int(number(row, "step", 0.0)),
                    description=said,
                    left=time_left(follower.rows, steps),
                )
            time.sleep(0.25)
        follower.read()


def _lines(follower: Follower, steps: int, running: Callable[[], bool], console: Console) -> None:
    last = time.monotonic()
    while running():
        time.sleep(0.25)
        if time.monotonic() - last >= PLAIN_EVERY:
            last, row = time.monotonic(), follower.read()
            left = time_left(follower.rows, steps)
            console.print(
                f"step {number(row, 'step', 0.0):.0f}/{steps}  {describe(row)}  {left}"
                if row
                else "starting the ranks",
                highlight=False,
            )
    follower.read()


def describe(row: dict[str, Any]) -> str:
    """Returns loss, learning rate and speed of one row."""
    loss, rate = number(row, "loss/total"), number(row, "opt/lr")
    return f"loss {loss:.4f}  lr {rate:.2e}  {number(row, 'perf/audio_seconds_per_second', 0.0):.0f} × real time"


def losses(rows: Sequence[dict[str, Any]], most: int = 64 * SPARKS) -> list[float]:
    """Returns the finite losses of at most `most` evenly spaced rows; a limit, as the curve is drawn often."""
    some = (number(row, "loss/total") for row in rows[:: -(-len(rows) // most) or 1])
    return [loss for loss in some if math.isfinite(loss)]


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """Returns a curve of at most `width` characters, each for the median of its part, scaled to the largest."""
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    heights = [statistics.median(part) for part in parts]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    span = (high - low) or 1.0
    return "".join(BARS[round((height - low) / span * (len(BARS) - 1))] for height in heights)


def time_left(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """Returns the time to the last step, from the median of recent steps, which pauses before a resume do not affect.

    It is "" until two steps are known.
    """
    recent = [(number(row, "step"), number(row, "time")) for row in rows[-RECENT:]]
    each = [
        (later - earlier) / (step - before)
        for (before, earlier), (step, later) in itertools.pairwise(recent)
        if step > before and math.isfinite(later - earlier)
    ]
    if not each:
        return ""
    seconds = min(max(0.0, statistics.median(each) * (steps - recent[-1][0])), LONGEST_SECONDS)
    return f"{datetime.timedelta(seconds=round(seconds))} left"
