"""Shows a run while it goes on, by following metrics.jsonl; it needs nothing from the run but its folder."""

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

PLAIN_EVERY = 15.0
"""Seconds between lines where the output is no terminal."""
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 16
"""Characters of the loss curve."""
RECENT = 50
"""Rows that the remaining time is estimated from."""


class Follower:
    """Reads a run's metrics.jsonl while the run writes it."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder / "metrics.jsonl")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows read so far."""
        return self._tail.rows

    def read(self) -> dict[str, Any] | None:
        """Reads what was added and returns the newest row, if any; reads the whole file after a resume replaced it."""
        self._tail.read()
        return self.rows[-1] if self.rows else None


def follow(folder: Path, steps: int, running: Callable[[], bool], console: Console | None = None) -> Follower:
    """Shows progress until `running` says no."""
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
                bar.update(task, completed=row["step"], description=said, left=time_left(follower.rows, steps))
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
                f"step {row['step']}/{steps}  {describe(row)}  {left}" if row else "starting the ranks", highlight=False
            )
    follower.read()


def describe(row: dict[str, Any]) -> str:
    """One row in a few words."""
    speed = row.get("perf/audio_seconds_per_second", 0.0)
    return f"loss {row['loss/total']:.4f}  lr {row['opt/lr']:.2e}  {speed:.0f} audio-s/s"


def losses(rows: Sequence[dict[str, Any]], most: int = 64 * SPARKS) -> list[float]:
    """The loss of `most` rows at most, evenly taken: a long run has too many to look at four times a second."""
    some = rows[:: -(-len(rows) // most) or 1]
    return [row["loss/total"] for row in some if math.isfinite(row["loss/total"])]


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """The whole curve in at most `width` characters, each the median of its part; the highest is full."""
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    heights = [statistics.median(part) for part in parts]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    span = (high - low) or 1.0
    return "".join(BARS[round((height - low) / span * (len(BARS) - 1))] for height in heights)


def time_left(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """By the median time of the last steps, so that a resumed run is judged by its own; empty until two are known."""
    recent = rows[-RECENT:]
    each = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(recent)
        if later["step"] > earlier["step"] and "time" in earlier
    ]
    if not each:
        return ""
    seconds = max(0.0, statistics.median(each) * (steps - recent[-1]["step"]))
    return f"{datetime.timedelta(seconds=round(seconds))} left"
