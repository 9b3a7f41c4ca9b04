"""Summaries of runs, from their config.json, metrics.jsonl, health.jsonl and evaluations.jsonl."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError, hint
from pretrain.checkpointing.locate import POINTER, near
from pretrain.checkpointing.run_folder import read_config

ALIVE_SECONDS = 120.0
"""Seconds without output after which a run counts as stopped."""
CLOCK_SKEW_SECONDS = 60.0
"""Permitted difference of the clocks of two machines, in seconds."""


@dataclass(frozen=True)
class RunSummary:
    """One run's key figures."""

    name: str
    folder: Path
    objective: str
    state: str
    step: int
    steps: int
    loss: float
    accuracy: float
    hours: float
    """Hours of audio seen."""
    speed: float
    """Audio-seconds per second, the median of the last steps."""
    alarms: int
    evaluation: str


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Returns the run folders among `roots` and up to two levels below them, by name.

    Raises:
        ConfigError: there is none, or a root does not exist; with the nearest name.
    """
    found: dict[Path, None] = {}
    for root in roots:
        for pattern in ("config.json", "*/config.json", "*/*/config.json"):
            for path in sorted(root.glob(pattern)):
                if (path.parent / "metrics.jsonl").exists() or (path.parent / "logs").exists():
                    found[path.parent] = None
    missing = [root for root in roots if not root.exists()]
    if missing or not found:
        name, equals, value = str(missing[0]).partition("=") if missing else ("", "", "")
        hint = f"; an option is written --{name} {value}" if equals else near(missing[0]) if missing else ""
        raise ConfigError(f"there is no run folder in {', '.join(map(str, missing or roots))}{hint}")
    return list(found)


def find_run(name: str, runs: Path = Path("runs")) -> Path:
    """Returns the folder of one run.

    Args:
        name: a run folder, or the name of a run below `runs`.
        runs: folder of run folders.

    Raises:
        ConfigError: there is no such run; with the nearest name.
    """
    marks = ("config.json", "job.json", "task.json")
    for folder in (Path(name).expanduser(), runs / name):
        if any((folder / mark).is_file() for mark in marks):
            return folder
    known = sorted({file.parent.name for mark in marks for file in runs.glob(f"*/{mark}")})
    near, listed = hint(Path(name).name, known), ", ".join(known) or "none"
    raise ConfigError(f"there is no run {name!r}{near}; below {runs}/ there are: {listed}")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Returns the rows of a run's JSON-lines file; unreadable lines are skipped."""
    return read_rows(folder / name)


def last_activity(folder: Path, now: float | None = None) -> float:
    """Returns the time of the newest output of any rank of the run, in seconds since 1970; 0 without any.

    Times in the future (a wrong clock, a copied folder) are ignored.
    """
    now = time.time() if now is None else now
    times = [0.0]
    for pattern in ("heartbeats/*.json", "metrics.jsonl", "incarnations/*", f"checkpoints/{POINTER}"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # replaced after the folder was listed
                times.append(path.stat().st_mtime)
    return max(moment for moment in times if moment <= now + CLOCK_SKEW_SECONDS)


def summarise(folder: Path, now: float | None = None) -> RunSummary:
    """Returns the key figures of one run.

    Raises:
        ValueError: its config.json is invalid.
    """
    config, now = read_config(folder), time.time() if now is None else now
    metrics, steps = rows(folder), int(config["train"]["steps"])
    last = metrics[-1] if metrics else {}
    tail = metrics[-20:]
    step = int(number(last, "step", 0.0))
    logged = number(last, "time", 0.0)
    age = now - max(last_activity(folder, now), logged if logged <= now + CLOCK_SKEW_SECONDS else 0.0)
    state = "done" if step >= steps else "running" if age < ALIVE_SECONDS else "stopped" if step else "no step yet"
    if (folder / "UNHEALTHY").is_file():
        state = "unhealthy"
    evaluations = rows(folder, "evaluations.jsonl")
    newest = evaluations[-1] if evaluations else None
    return RunSummary(
        name=folder.resolve().name,
        folder=folder,
        objective=str(objective.get("name")) if isinstance(objective := config.get("objective"), dict) else "–",
        state=state,
        step=step,
        steps=steps,
        loss=_mean(tail, "loss/total"),
        accuracy=_mean(tail, "metric/accuracy"),
        hours=audio_hours(metrics)[-1] if metrics else 0.0,
        speed=statistics.median([number(row, "perf/audio_seconds_per_second", 0.0) for row in tail]) if tail else 0.0,
        alarms=len(rows(folder, "health.jsonl")),
        evaluation=f"{newest.get('name', '')} {number(newest, 'value'):.3f}" if newest else "",
    )


def number(row: Mapping[str, Any], name: str, default: float = math.nan) -> float:
    """Returns a value of a row of metrics; `default` if it is missing or not a number."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def audio_hours(metrics: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the hours of audio seen up to each row; for older runs without this value, the hours of logged steps."""
    if all("data/audio_hours" in row for row in metrics):
        return [number(row, "data/audio_hours", 0.0) for row in metrics]
    return [hours / 3600 for hours in itertools.accumulate(number(row, "data/audio_seconds", 0.0) for row in metrics)]


def _mean(chosen: Sequence[dict[str, Any]], name: str) -> float:
    values = [value for row in chosen if not math.isnan(value := number(row, name))]
    return statistics.fmean(values) if values else math.nan


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Returns the bias-corrected exponential moving average."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        out.append(total / weight)
    return out
