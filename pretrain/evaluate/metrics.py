"""Accuracy, equal error rate and PNMI, with bootstrap intervals over speakers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NON_SILENCE = "non-silence frames"
"""Name of the measure of frame tasks that leaves out frames of silence."""
Tally = Mapping[str, tuple[float, float]]
"""speaker -> (hits, trials)."""


@dataclass(frozen=True, slots=True)
class Interval95:
    """A value with its 95 % interval over speakers."""

    value: float
    low: float
    high: float


def accuracy(tallies: Sequence[Tally]) -> float:
    """Returns hits / trials of each seed, averaged over seeds."""
    return float(np.mean([sum(h for h, _ in t.values()) / max(1.0, sum(n for _, n in t.values())) for t in tallies]))


def bootstrap(tallies: Sequence[Tally], times: int, minus: Sequence[Tally] | None = None) -> Interval95:
    """Returns accuracy (or its difference to `minus`, paired by speaker) with a percentile interval over speakers.

    Speakers are drawn with replacement; seeds are averaged within a draw. With one speaker the interval has width 0.

    Args:
        tallies: hits and trials by speaker, for each seed.
        times: number of draws.
        minus: tallies to subtract.
    """
    speakers = sorted(tallies[0])
    picks = np.random.default_rng(0).integers(0, len(speakers), (times, len(speakers)))

    def draws(of: Sequence[Tally]) -> np.ndarray:
        total = np.zeros(times)
        for tally in of:
            pairs = np.array([tally[speaker] for speaker in speakers])
            sums = pairs[picks].sum(1)
            total += sums[:, 0] / np.maximum(sums[:, 1], 1.0)
        return total / len(of)

    values, value = draws(tallies), accuracy(tallies)
    if minus is not None:
        values, value = values - draws(minus), value - accuracy(minus)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval95(value, float(low), float(high))


def phone_normalized_mutual_information(phones: np.ndarray, units: np.ndarray) -> tuple[float, float, float]:
    """Returns PNMI, phone purity and cluster purity of units against phones (HuBERT, arXiv 2106.07447, §IV.A)."""
    _, p = np.unique(phones, return_inverse=True)
    _, u = np.unique(units, return_inverse=True)
    joint = np.zeros((p.max() + 1, u.max() + 1))
    np.add.at(joint, (p, u), 1.0)
    joint /= joint.sum()
    by_phone, by_unit = joint.sum(1), joint.sum(0)
    mask = joint > 0
    information = float((joint[mask] * np.log(joint[mask] / np.outer(by_phone, by_unit)[mask])).sum())
    phone_entropy = float(-(by_phone * np.log(by_phone)).sum())
    return information / max(phone_entropy, 1e-12), float(joint.max(0).sum()), float(joint.max(1).sum())


def equal_error_rate(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Returns the rate at the threshold where misses and false accepts are equal.

    Args:
        scores: (P,) similarity of each pair.
        same: (P,) whether the pair is of one speaker.
        weights: (P,) how often the pair counts; None: once.
    """
    order = np.argsort(scores, kind="stable")
    truth, weight = same[order], np.ones(len(scores)) if weights is None else weights[order]
    missed = np.cumsum(weight * truth) / max(1e-12, float(weight[truth].sum()))
    accepted = 1.0 - np.cumsum(weight * ~truth) / max(1e-12, float(weight[~truth].sum()))
    where = int(np.argmin(np.abs(missed - accepted)))
    return float((missed[where] + accepted[where]) / 2)


def average_precision(ranked: np.ndarray) -> float:
    """Returns the mean precision at the ranks of the relevant items.  ranked: (N,) relevance, best first."""
    (at,) = np.nonzero(ranked)
    return float(np.mean((np.arange(len(at)) + 1) / (at + 1))) if len(at) else 0.0
