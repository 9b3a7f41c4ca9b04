"""Observation: measurements of single updates, and their means and sums over a window.

detection.py compares them with limits; policy.py decides what follows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.core.types import Batch
from pretrain.engines.base import NumpySum, StepResult
from pretrain.interfaces.monitoring import MonitoringRecord
from pretrain.monitoring.detectors import entropy

NORMS = 100
"""Number of gradient norms in the running median."""
SILENT = 1e-4
"""Range of samples below which audio is silent or constant: about three steps of 16-bit audio, or -80 dBFS."""


def mean_of(metrics: Mapping[str, NumpySum], name: str | None) -> float:
    """Returns the mean of a metric; NaN if it is absent or its count is 0."""
    total, count = metrics.get(name or "", (np.zeros(1), 0.0))
    return float(np.ravel(total)[0]) / count if count > 0 else math.nan


def deviation_of(metrics: Mapping[str, NumpySum], name: str | None) -> float | None:
    """Returns the deviation in a metric; None if the objective has no such metric or no frame was measured."""
    total, count = metrics.get(name or "", (np.zeros(1), 0.0))
    return float(total[0]) / count if count > 0 else None


def code_counts(record: MonitoringRecord, metrics: Mapping[str, NumpySum]) -> tuple[np.ndarray, ...]:
    """Returns the counts per code of each of the objective's books that was counted."""
    counted = [book for book in record.books if book.metric in metrics]
    return tuple(metrics[book.metric][0][book.first : book.first + book.size] for book in counted)


def chance_accuracy(record: MonitoringRecord, metrics: Mapping[str, NumpySum]) -> float:
    """Returns the accuracy of guessing among each target's candidates, or else the share of the most frequent code."""
    if record.chance_accuracy is not None:
        return mean_of(metrics, record.chance_accuracy)
    shares = [float(counts.max() / counts.sum()) for counts in code_counts(record, metrics) if counts.sum() > 0]
    return float(np.mean(shares)) if shares else math.nan


def silent_segments(batches: Sequence[Batch]) -> list[str]:
    """Returns the keys of segments whose audio is silent or constant."""
    found = []
    for batch in batches:
        for wave_T, length, key in zip(batch.wave_BT, batch.lengths_B.tolist(), batch.keys, strict=True):
            if length == 0 or float(wave_T[:length].max() - wave_T[:length].min()) < SILENT:
                found.append(key)
    return found


@dataclass(frozen=True)
class UpdateObservation:
    """Measurements of one update for the pooled detectors. NaN: not reported by the objective."""

    loss: float
    """Per target, without regularisers."""
    accuracy: float
    chance_loss: float
    chance_accuracy: float
    books: tuple[np.ndarray, ...]
    """Counts per code of each code book."""
    samples: int
    seconds: float
    waits: np.ndarray
    """Seconds that each rank waited for data."""
    unusable: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Labelled rows of each head that it cannot use, and all its labelled rows."""


def observe(
    record: MonitoringRecord, result: StepResult, seconds: float, infeasible: Mapping[str, str] | None = None
) -> UpdateObservation:
    """Returns the observation of one finished update.

    Args:
        record: the objective's record from before the update, which may replace its books.
        result: the sums over all ranks.
        seconds: wall time of the step.
        infeasible: by head, the metric that counts labelled rows that it cannot use.
    """
    loss = mean_of(result.metrics, record.loss)
    return UpdateObservation(
        loss=result.loss if math.isnan(loss) else loss,
        accuracy=mean_of(result.metrics, record.accuracy),
        chance_loss=mean_of(result.metrics, record.chance_loss),
        chance_accuracy=mean_of(result.metrics, record.chance_accuracy),
        books=code_counts(record, result.metrics),
        samples=result.samples,
        seconds=seconds,
        waits=np.array(result.signals.wait_seconds),
        unusable={head: _sum_and_count(result.metrics, metric) for head, metric in (infeasible or {}).items()},
    )


def _sum_and_count(metrics: Mapping[str, NumpySum], name: str) -> tuple[float, float]:
    total, count = metrics.get(name, (np.zeros(1), 0.0))
    return float(np.ravel(total)[0]), count


@dataclass(frozen=True)
class Pooled:
    """Means and sums over the updates of a window. NaN: not measured."""

    updates: int
    loss: float
    accuracy: float
    chance_loss: float
    """Loss of predicting the distribution of the targets; 0 if that is undefined."""
    chance_accuracy: float
    books: tuple[np.ndarray, ...]
    contrastive: bool
    """Whether the chance level is that of guessing among negatives."""
    samples: float
    seconds: float
    waits: Mapping[int, float]
    unusable: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Labelled rows of each head that it cannot use, and all its labelled rows, over the window."""


def pool(recent: Sequence[UpdateObservation]) -> Pooled:
    """Returns the window's means and sums."""
    books = tuple(np.sum(counts, axis=0) for counts in zip(*(seen.books for seen in recent), strict=True))
    of_guess = _mean([seen.chance_loss for seen in recent])
    of_books = sum(map(entropy, books)) / len(books) if books else 0.0
    return Pooled(
        updates=len(recent),
        loss=_mean([seen.loss for seen in recent]),
        accuracy=_mean([seen.accuracy for seen in recent]),
        chance_loss=of_books if math.isnan(of_guess) else of_guess,
        chance_accuracy=_mean([seen.chance_accuracy for seen in recent]),
        books=books,
        contrastive=not math.isnan(of_guess),
        samples=_mean([seen.samples for seen in recent]),
        seconds=_mean([seen.seconds for seen in recent]),
        waits=dict(enumerate(np.mean([seen.waits for seen in recent], axis=0).tolist())) if recent else {},
        unusable=_unusable(recent),
    )


def _unusable(recent: Sequence[UpdateObservation]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for seen in recent:
        for name, (unusable, labelled) in seen.unusable.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + unusable, before[1] + labelled
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@dataclass
class MonitoringState:
    """Measurements that a resumed run needs; saved in the checkpoint as plain JSON."""

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    """Newest gradient norms; the same on all ranks."""
    first: dict[str, float] = field(default_factory=dict)
    """The first deviation of each stage, of the targets and of the predictions."""
    best: dict[str, float] = field(default_factory=dict)
    """The largest rank of each stage since the warm-up, and the largest perplexity."""
    targets_since: int = 0
    """The step since which the model has its current targets."""
    heard: int = 0
    """Samples of audio seen since the first update."""
    without_targets: dict[str, int] = field(default_factory=dict)
    """Updates in a row without a target, by task; the same on all ranks."""

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> MonitoringState:
        """Returns the memory of a checkpoint; fields that earlier versions did not save are empty."""
        return cls(
            deque(values.get("norms", []), NORMS),
            dict(values.get("first", {})),
            dict(values.get("best", {})),
            int(values.get("targets_since", 0)),
            int(values.get("heard", 0)),
            dict(values.get("without_targets", {})),
        )

    def dump(self) -> dict[str, Any]:
        """Returns the memory as plain JSON."""
        return {
            "norms": list(self.norms),
            "first": dict(self.first),
            "best": dict(self.best),
            "targets_since": self.targets_since,
            "heard": self.heard,
            "without_targets": dict(self.without_targets),
        }

    def add(self, result: StepResult, tasks: Sequence[str]) -> None:
        """Adds one finished update, the same on every rank."""
        self.heard += result.samples
        self.norms.append(result.grad_norm)
        for task in tasks:
            count = result.metrics.get(f"loss/{task}", (None, 1.0))[1]
            self.without_targets[task] = 0 if count > 0 else self.without_targets.get(task, 0) + 1

    def first_of(self, name: str, value: float) -> float:
        """Returns the first value that was measured under this name."""
        return self.first.setdefault(name, value)

    def best_of(self, name: str, value: float) -> float:
        """Returns the largest value so far, this one included."""
        self.best[name] = max(value, self.best.get(name, 0.0))
        return self.best[name]
