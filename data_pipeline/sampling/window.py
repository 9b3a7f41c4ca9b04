"""Plans one window of an epoch: divides its bucketed segments into micro-batches of equal seconds, and into steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_pipeline.core.rng import keyed_hash, keyed_seed
from data_pipeline.sampling.constraints import Array, BatchConstraints

POPULOUS = 4
"""Least size, in micro-batches, of a bucket that is shuffled; smaller buckets are sorted by length."""


@dataclass(frozen=True)
class Rows:
    """R rows of a window: shard number, row in the shard, usable samples, number of the repeat, random rank.

    text_R: whether the segment has a text; False where texts do not matter to the plan.
    """

    shard_R: Array
    row_R: Array
    length_R: Array
    repeat_R: Array
    rank_R: Array
    text_R: Array

    @property
    def columns(self) -> tuple[Array, ...]:
        """Returns all columns in the order of the fields."""
        return self.shard_R, self.row_R, self.length_R, self.repeat_R, self.rank_R, self.text_R

    def take(self, order: Array) -> Rows:
        """Returns the rows `order`."""
        return Rows(*(column[order] for column in self.columns))


@dataclass(frozen=True)
class MicroBatch:
    """The n rows of one micro-batch: shard number, row in the shard, samples to read, number of the repeat."""

    shard_n: Array
    row_n: Array
    length_n: Array
    repeat_n: Array
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels that the plan gives to the rows, by name, beside those of the segments."""

    @property
    def samples(self) -> int:
        """Audio samples without padding."""
        return int(self.length_n.sum())

    @property
    def padded_samples(self) -> int:
        """Audio samples with padding."""
        return int(self.length_n.max()) * len(self.length_n)


@dataclass(frozen=True)
class Window:
    """R rows in micro-batch order. first_K1: first row of each micro-batch. order_GV: the micro-batches of each step.

    spanning_K: micro-batches of more than one bucket; cropped: samples removed to keep those within their limit.
    """

    shard_R: Array
    row_R: Array
    length_R: Array
    repeat_R: Array
    first_K1: Array
    order_GV: Array
    samples_K: Array
    padded_K: Array
    spanning_K: Array
    cropped: int

    def micro_batch(self, step: int, j: int) -> MicroBatch:
        """Returns micro-batch `j` of step `step` of this window."""
        k = self.order_GV[step, j]
        rows = slice(int(self.first_K1[k]), int(self.first_K1[k + 1]))
        return MicroBatch(self.shard_R[rows], self.row_R[rows], self.length_R[rows], self.repeat_R[rows])

    def samples(self, step: int) -> int:
        """Returns the audio samples of a step of this window, without padding."""
        return int(self.samples_K[self.order_GV[step]].sum())

    def padded_samples(self, step: int) -> int:
        """Returns the audio samples of a step of this window, with padding."""
        return int(self.padded_K[self.order_GV[step]].sum())


def build_window(rows: Rows, *, constraints: BatchConstraints, steps: int, key: tuple[int, int, int]) -> Window:
    """Orders the rows of a window by bucket and cuts them into `steps` x V micro-batches.

    Where some rows have a text and others have none, micro-batches have rows of one kind, and every step has as many
    micro-batches of each.

    Args:
        rows: all rows of the window, in any order that is the same on every rank.
        constraints: bucket edges, V, and the limits of a micro-batch.
        steps: number of global steps.
        key: (seed, epoch, window number); keys the order of the steps.
    """
    made, orders, first = list[_Cut](), list[Array](), 0
    for part, micro_batches in _kinds(rows, constraints.micro_batches, steps):
        n_micro = steps * micro_batches
        made.append(_cut(part, constraints, n_micro, begin=sum(len(one.rows.row_R) for one in made)))
        orders.append(first + np.arange(n_micro).reshape(steps, micro_batches))
        first += n_micro
    length_R, first_K, samples_K, padded_K, spanning_K = (
        np.concatenate(columns)
        for columns in zip(
            *((one.length_R, one.first_K, one.samples_K, one.padded_K, one.spanning_K) for one in made), strict=True
        )
    )
    ordered = Rows(*(np.concatenate(column) for column in zip(*(one.rows.columns for one in made), strict=True)))
    return Window(
        shard_R=ordered.shard_R,
        row_R=ordered.row_R,
        length_R=length_R,
        repeat_R=ordered.repeat_R,
        first_K1=np.append(first_K, len(length_R)),
        order_GV=_steps(padded_K, np.concatenate(orders, axis=1), key),
        samples_K=samples_K,
        padded_K=padded_K,
        spanning_K=spanning_K,
        cropped=int(rows.length_R.sum() - length_R.sum()),
    )


def _kinds(rows: Rows, micro_batches: int, steps: int) -> list[tuple[Rows, int]]:
    """Returns the rows with a text and those without, and how many micro-batches of a step each kind has.

    They are one kind where only one is there, or where one has fewer rows than there are steps.
    """
    kinds = [rows.take(np.flatnonzero(rows.text_R)), rows.take(np.flatnonzero(~rows.text_R))]
    counts = [len(kind.row_R) // steps for kind in kinds]  # each micro-batch needs a row
    if not all(counts) or sum(counts) < micro_batches:
        return [(rows, micro_batches)]
    share = int(kinds[0].length_R.sum()) / int(rows.length_R.sum())
    texts = min(max(round(micro_batches * share), micro_batches - counts[1], 1), micro_batches - 1, counts[0])
    return list(zip(kinds, (texts, micro_batches - texts), strict=True))


class _Cut(NamedTuple):
    """Rows in micro-batches, with the number of each one's first row in the window."""

    rows: Rows
    length_R: Array
    first_K: Array
    samples_K: Array
    padded_K: Array
    spanning_K: Array


def _cut(rows: Rows, constraints: BatchConstraints, n_micro: int, begin: int) -> _Cut:
    """Orders rows by bucket and cuts them into `n_micro` micro-batches; `begin` rows are before them in the window."""
    total = int(rows.length_R.sum())
    edges = constraints.edges
    bucket_R = np.searchsorted(edges, rows.length_R, side="right") - 1
    audio_B = np.bincount(bucket_R, rows.length_R, len(edges))
    sparse_R = (audio_B * n_micro < POPULOUS * total)[bucket_R]
    order = np.lexsort((rows.rank_R, np.where(sparse_R, rows.length_R, 0), bucket_R))
    rows, bucket_R = rows.take(order), bucket_R[order]

    first_K1 = cut_evenly(rows.length_R, n_micro)
    begins, sizes = first_K1[:-1], np.diff(first_K1)
    spanning_K = bucket_R[begins] != bucket_R[first_K1[1:] - 1]
    shortest_K = np.minimum.reduceat(rows.length_R, begins)
    limit = constraints.padded_limit(total / n_micro)
    allowed_K = np.maximum((shortest_K * constraints.ratio).astype(np.int64), (limit / sizes).astype(np.int64))
    allowed_K = np.where(spanning_K, shortest_K if constraints.crop else allowed_K, constraints.longest)
    length_R = np.minimum(rows.length_R, np.repeat(allowed_K, sizes))

    samples_K = np.add.reduceat(length_R, begins)
    padded_K = np.maximum.reduceat(length_R, begins) * sizes
    return _Cut(rows, length_R, begin + begins, samples_K, padded_K, spanning_K)


def cut_evenly(length_R: Array, n_micro: int) -> Array:
    """Returns the first row of each of `n_micro` non-empty ranges of nearly equal audio, and the end."""
    sums = np.concatenate([[0], np.cumsum(length_R)])
    # Python integers: k * total may exceed 2**63.
    total = int(sums[-1])
    aims = np.array([k * total // n_micro for k in range(1, n_micro)], dtype=np.int64)
    above = np.clip(np.searchsorted(sums, aims), 1, len(sums) - 1)
    nearest = np.where(aims - sums[above - 1] <= sums[above] - aims, above - 1, above)
    k = np.arange(1, n_micro)
    nearest = np.maximum.accumulate(np.maximum(nearest, 1) - k) + k
    nearest = np.minimum(nearest, len(length_R) - n_micro + k)
    return np.concatenate([[0], nearest, [len(length_R)]]).astype(np.int64)


def _steps(padded_K: Array, order_GV: Array, key: tuple[int, int, int]) -> Array:
    """Shuffles the steps, each of which has the micro-batches of one row of `order_GV`.

    Within a step micro-batches are sorted by decreasing size, so that for every number of ranks the load of the ranks
    is nearly equal in each accumulation step.
    """
    within = np.argsort(-padded_K[order_GV], axis=1, kind="stable")
    order_GV = np.take_along_axis(order_GV, within, axis=1)
    return order_GV[np.argsort(keyed_hash(keyed_seed(*key, "steps"), np.arange(len(order_GV))), kind="stable")]
