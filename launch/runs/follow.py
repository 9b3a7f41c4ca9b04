"""Shows the progress of a run from its metrics.jsonl."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_pipeline.core.jsonl import Tail, read_rows
from data_pipeline.core.schema import ConfigError, load
from launch.runs.summary import audio_hours, number
from pretrain.checkpointing.run_folder import read_config
from pretrain.monitoring.heartbeat import read_notes

PLAIN_EVERY = 15.0
"""Seconds between lines if the output is not a terminal."""
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 16
"""Width of the loss curve in characters."""
NARROW, NARROW_SPARKS = 100, 4
"""Columns below which a terminal shows no bar and no elapsed time, and the width of its curve."""
RECENT = 50
"""Number of rows from which the remaining time is estimated."""
LAST_ROWS = 20
"""Rows, at most a tenth of all, whose mean is the last value of a figure."""
FIGURES = (
    ("held-out loss", "valid/loss/total"),
    ("held-out accuracy", "valid/metric/accuracy"),
    ("held-out code usage", "valid/metric/code_usage"),
    ("held-out perplexity", "valid/metric/perplexity"),
    ("training accuracy", "metric/accuracy"),
)
"""Rows of the table of a finished run besides the loss, each shown where the run has it."""
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
    """Shows progress until `running` returns False; returns the rows read.

    Args:
        folder: the run folder.
        steps: updates of the whole run.
        running: returns whether the run still runs.
        console: for the progress; None: standard error.
    """
    console = console or Console(stderr=True)
    follower = Follower(folder)
    if console.is_terminal:
        _bar(follower, folder, steps, running, console)
    else:
        _lines(follower, folder, steps, running, console)
    return follower


def _bar(follower: Follower, folder: Path, steps: int, running: Callable[[], bool], console: Console) -> None:
    narrow = console.width < NARROW
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [] if narrow else [BarColumn()]
    columns += [TextColumn("{task.completed}/{task.total}")]
    columns += [] if narrow else [TimeElapsedColumn()]
    columns += [TextColumn("{task.fields[left]}")]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(first_update(folder), total=steps, left="")
        while running():
            row = follower.read()
            if row:
                said = f"{progress_line(row)}  {sparkline(losses(follower.rows), NARROW_SPARKS if narrow else SPARKS)}"
                bar.update(
                    task,
                    completed=int(number(row, "step", 0.0)),
                    description=said,
                    left=time_left(follower.rows, steps),
                )
            else:
                bar.update(task, description=first_update(folder))
            time.sleep(0.25)
        follower.read()


def _lines(follower: Follower, folder: Path, steps: int, running: Callable[[], bool], console: Console) -> None:
    last, said = time.monotonic(), ""
    while running():
        time.sleep(0.25)
        if time.monotonic() - last >= PLAIN_EVERY:
            last, row = time.monotonic(), follower.read()
            place = (
                f"step {number(row, 'step', 0.0):.0f}/{steps}  {progress_line(row)}" if row else first_update(folder)
            )
            if place != said:
                left = f"  {time_left(follower.rows, steps)}" if row else ""
                console.print(place + left, highlight=False, soft_wrap=True)
            said = place
    follower.read()


def first_update(folder: Path) -> str:
    """Returns the activity of a run before its first row of metrics, from the heartbeats of its newest start."""
    notes = read_notes(folder)
    newest = max((note.start for note in notes), default=0)
    notes = [note for note in notes if note.start == newest]
    if not notes:
        return "starting the ranks: model, shards and plan"
    begun, size = sum(note.micro_batches for note in notes), _micro_batches(folder)
    if not begun:
        return (
            "first update: reading audio"
            if any(note.phase == "reading" for note in notes)
            else ("first update: drawing masks and counting targets")
        )
    return f"first update: {min(begun, size) if size else begun} of {size or 'its'} micro-batches"


def _micro_batches(folder: Path) -> int:
    try:
        return int(read_config(folder)["data"]["micro_batches"])
    except (ValueError, KeyError, TypeError):
        return 0


def progress_line(row: dict[str, Any]) -> str:
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
    days, rest = divmod(round(seconds), 86_400)
    return f"{days} d {rest // 3600} h left" if days else f"{datetime.timedelta(seconds=rest)} left"


def ending(folder: Path, newest: Path) -> list[tuple[str, str]]:
    """Returns the table of a finished run: loss, held-out loss, time, audio, alarms, checkpoint and the next commands.

    Args:
        folder: the run folder.
        newest: its last checkpoint.
    """
    rows, place = Follower(folder), shlex.quote(str(folder))
    last = rows.read() or {}
    found = [("loss", _first_to_last(rows.rows, "loss/total"))]
    known = dict.fromkeys(itertools.chain.from_iterable(rows.rows))
    for name, tag in FIGURES:  # of several code books, the main one or each
        tags = [tag] if tag in known else [one for one in known if one.startswith(tag)]
        found += [(name + one.removeprefix(tag), _first_to_last(rows.rows, one)) for one in tags]
    before, seconds = 0.0, 0.0
    for row in rows.rows:
        step = number(row, "step", before)
        seconds += (step - before) * number(row, "perf/step_seconds", 0.0)
        before = step
    hours = audio_hours(rows.rows)[-1] if rows.rows else 0.0
    speed = f", {hours * 3600 / seconds:,.0f} × real time" if seconds else ""
    found += [
        ("time", f"{datetime.timedelta(seconds=round(seconds))} in {number(last, 'step', 0.0):,.0f} updates"),
        ("audio", f"{hours:,.2f} h{speed}"),
    ]
    if alarms := len(read_rows(folder / "health.jsonl")):
        found.append(("alarms", f"{alarms}, see {folder / 'health.jsonl'}"))
    return [
        *found,
        ("checkpoint", str(newest)),
        *zip(("next", "", "", ""), _next_commands(newest, place), strict=False),
    ]


def _next_commands(newest: Path, place: str) -> list[str]:
    """Returns the commands that fit the run: of a recogniser those of recognition, and a format that can export it."""
    from pretrain.checkpointing.stored import read_state  # imports torch
    from pretrain.config import Config
    from pretrain.heads import ctc
    from pretrain.interop import hf_export

    recogniser, form = False, ""
    with contextlib.suppress(ValueError, OSError, KeyError):  # of a checkpoint that cannot be read
        config = load(Config, read_state(newest)["config"])
        recogniser = not config.objective.has_loss and any(isinstance(h, ctc.Config) for h in config.heads.values())
        try:
            hf_export.describe(config, "")
        except ConfigError:
            form = " --to onnx"
    task = "asr" if recogniser else "phones"
    return [
        f"auricle evaluate checkpoint={place} task={task} manifest=MANIFEST",
        *([f"auricle transcribe checkpoint={place} files=AUDIO"] if recogniser else []),
        f"auricle export {place} OUT{form}",
        f"auricle board {place}",
    ]


def _first_to_last(rows: Sequence[dict[str, Any]], tag: str) -> str:
    """Returns the first value of a figure and the mean of its last ones."""
    values = [value for row in rows if math.isfinite(value := number(row, tag))]
    if not values:
        return "–"
    return f"{values[0]:.4g} → {statistics.fmean(values[-min(LAST_ROWS, -(-len(values) // 10)) :]):.4g}"
