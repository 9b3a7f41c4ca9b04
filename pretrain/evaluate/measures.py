"""Figures of merit, and how sure they are: accuracy, EER, PNMI, ABX, and the bootstrap over speakers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Tally = Mapping[str, tuple[float, float]]
"""speaker -> (hits, trials)."""


@dataclass(frozen=True, slots=True)
class Interval95:
    """A figure with its 95 % interval over speakers."""

    value: float
    low: float
    high: float


def accuracy(tallies: Sequence[Tally]) -> float:
    """Hits / trials of each seed, then the mean over seeds."""
    return float(np.mean([sum(h for h, _ in t.values()) / max(1.0, sum(n for _, n in t.values())) for t in tallies]))


def bootstrap(tallies: Sequence[Tally], times: int, minus: Sequence[Tally] | None = None) -> Interval95:
    """Accuracy (or its difference to `minus`, paired by speaker) with a percentile interval over test speakers.

    Speakers are drawn with replacement; seeds are averaged within a draw. With one speaker the interval is a point.
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


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """Where as many same-speaker pairs score below a threshold as different-speaker pairs above it."""
    scores = np.concatenate([same, different])
    truth = np.concatenate([np.ones(len(same)), np.zeros(len(different))])[np.argsort(scores, kind="stable")]
    missed = np.cumsum(truth) / max(1, len(same))
    accepted = 1.0 - np.cumsum(1.0 - truth) / max(1, len(different))
    where = int(np.argmin(np.abs(missed - accepted)))
    return float((missed[where] + accepted[where]) / 2)


def phone_normalized_mutual_information(phones: np.ndarray, units: np.ndarray) -> tuple[float, float, float]:
    """PNMI, phone purity and cluster purity of units against phones (HuBERT, arXiv 2106.07447, §IV.A)."""
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


def dtw_distance(x_MD: np.ndarray, y_ND: np.ndarray) -> float:
    """Mean angular distance along the best alignment of two sequences of unit vectors (Schatz et al. 2013)."""
    cost = np.arccos(np.clip(x_MD @ y_ND.T, -1.0, 1.0)) / np.pi
    total = np.full((len(x_MD) + 1, len(y_ND) + 1), np.inf)
    length = np.zeros(total.shape)
    total[0, 0] = 0.0
    for i in range(1, total.shape[0]):
        for j in range(1, total.shape[1]):
            steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
            best = min(steps, key=lambda step: total[step])
            total[i, j] = total[best] + cost[i - 1, j - 1]
            length[i, j] = length[best] + 1
    return float(total[-1, -1] / length[-1, -1])


def abx_error(
    tokens: Sequence[tuple[str, str, np.ndarray]], triples: int, across: bool, seed: int = 0
) -> tuple[float, int]:
    """Share of triples in which X lies nearer to B (another phone) than to A (its own); ties count half.

    tokens: (phone, speaker, (F, D) features). A and B are of one speaker, X of the same or (across) of another one.
    Triples are drawn evenly over pairs of phones. Phone ABX as in Schatz et al. 2013, without context.
    Raises ValueError where no triple can be made.
    """
    rng = np.random.default_rng(seed)
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for _, _, x in tokens]
    by: dict[str, dict[str, list[int]]] = {}
    for i, (phone, speaker, _) in enumerate(tokens):
        by.setdefault(speaker, {}).setdefault(phone, []).append(i)
    wrong, made = 0.0, 0
    speakers = sorted(by)
    for _ in range(triples * 5):
        if made == triples:
            break
        one = speakers[rng.integers(len(speakers))]
        other = speakers[rng.integers(len(speakers))] if across else one
        phones = sorted(by[one])
        if len(phones) < 2 or (across and one == other):
            continue
        p, q = rng.choice(phones, 2, replace=False)
        a, b = rng.choice(by[one][p]), rng.choice(by[one][q])
        candidates = [i for i in by[other].get(p, []) if i != a]
        if not candidates:
            continue
        x = rng.choice(candidates)
        to_a, to_b = dtw_distance(unit[x], unit[a]), dtw_distance(unit[x], unit[b])
        wrong += 1.0 if to_a > to_b else 0.5 if to_a == to_b else 0.0
        made += 1
    if not made:
        raise ValueError("abx: no triple of two phones by one speaker could be made from these utterances")
    return wrong / made, made
