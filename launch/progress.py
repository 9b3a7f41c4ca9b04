"""Shows a run while it goes on, by following metrics.jsonl; it needs nothing from the run but its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY = 15.0
"""Seconds between lines where the output is no terminal."""


class Follower:
    """Reads the rows that were added to a run's metrics.jsonl since the last look."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._identity = 0
        self._offset = 0
        self.rows: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any] | None:
        """The newest row, if any. A resumed run replaces the file: it is then read anew."""
        if self._path.exists():
            status = self._path.stat()
            if status.st_ino != self._identity or status.st_size < self._offset:
                self._identity, self._offset, self.rows = status.st_ino, 0, []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            self.rows += [json.loads(line) for line in whole.splitlines()]
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
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting the ranks", total=steps)
        while running():
            row = follower.read()
            if row:
                bar.update(task, completed=row["step"], description=describe(row))
            time.sleep(0.25)
        follower.read()


def _lines(follower: Follower, steps: int, running: Callable[[], bool], console: Console) -> None:
    last = time.monotonic()
    while running():
        time.sleep(0.25)
        if time.monotonic() - last >= PLAIN_EVERY:
            last, row = time.monotonic(), follower.read()
            console.print(
                f"step {row['step']}/{steps}  {describe(row)}" if row else "starting the ranks", highlight=False
            )
    follower.read()


def describe(row: dict[str, Any]) -> str:
    """One row in a few words."""
    speed = row.get("perf/audio_seconds_per_second", 0.0)
    return f"loss {row['loss/total']:.4f}  lr {row['opt/lr']:.2e}  {speed:.0f} audio-s/s"
