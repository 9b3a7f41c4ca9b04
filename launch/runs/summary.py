"""Runs as their folders tell them: nothing but config.json, metrics.jsonl, health.jsonl and evaluations.jsonl."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.jsonl import read_rows

ALIVE_SECONDS = 120.0


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
    """Run folders among `roots` and one or two levels below them, by name. Raises ValueError where there is none."""
    found: dict[Path, None] = {}
    for root in roots:
        for pattern in ("config.json", "*/config.json", "*/*/config.json"):
            for path in sorted(root.glob(pattern)):
                if (path.parent / "metrics.jsonl").exists() or (path.parent / "logs").exists():
                    found[path.parent] = None
    if not found:
        raise ValueError(f"no run folder in {', '.join(map(str, roots))}")
    return list(found)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's JSON-lines file; lines that cannot be read are left out."""
    return read_rows(folder / name)


def signs_of_life(folder: Path) -> float:
    """When a rank of the run last wrote anything, in seconds since 1970; 0 if none ever did."""
    times = [0.0]
    for pattern in ("heartbeats/*.json", "metrics.jsonl", "incarnations/*", "checkpoints/latest"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # replaced while we looked
                times.append(path.stat().st_mtime)
    return max(times)


def summarise(folder: Path, now: float | None = None) -> RunSummary:
    """Reads one run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metrics, steps = rows(folder), int(config["train"]["steps"])
    last = metrics[-1] if metrics else {}
    tail = metrics[-20:]
    step = int(last.get("step", 0))
    age = (now or time.time()) - max(signs_of_life(folder), float(last.get("time", 0.0)))
    state = "done" if step >= steps else "running" if age < ALIVE_SECONDS else "stopped" if step else "no step yet"
    if (folder / "UNHEALTHY").is_file():
        state = "unhealthy"
    evaluations = rows(folder, "evaluations.jsonl")
    newest = evaluations[-1] if evaluations else None
    return RunSummary(
        name=folder.name,
        folder=folder,
        objective=str(config["objective"]["name"]),
        state=state,
        step=step,
        steps=steps,
        loss=_mean(tail, "loss/total"),
        accuracy=_mean(tail, "metric/accuracy"),
        hours=audio_hours(metrics)[-1] if metrics else 0.0,
        speed=statistics.median([row.get("perf/audio_seconds_per_second", 0.0) for row in tail]) if tail else 0.0,
        alarms=len(rows(folder, "health.jsonl")),
        evaluation=f"{newest['name']} {newest['value']:.3f}" if newest else "",
    )


def audio_hours(metrics: Sequence[dict[str, Any]]) -> list[float]:
    """Hours of audio heard by each row. Rows without that figure, of older runs, count those logged."""
    if all("data/audio_hours" in row for row in metrics):
        return [row["data/audio_hours"] for row in metrics]
    return [hours / 3600 for hours in itertools.accumulate(row.get("data/audio_seconds", 0.0) for row in metrics)]


def _mean(chosen: Sequence[dict[str, Any]], name: str) -> float:
    values = [row[name] for row in chosen if name in row]
    return statistics.fmean(values) if values else math.nan


def differences(one: Any, other: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Config fields in which two runs differ: (path, value of one, value of the other)."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in sorted(one.keys() | other.keys()):
            found += differences(one.get(key, "–"), other.get(key, "–"), f"{prefix}{key}.")
        return found
    return [] if one == other else [(prefix.rstrip("."), one, other)]


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        out.append(total / weight)
    return out
