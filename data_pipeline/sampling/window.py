"""One window of an epoch: its segments in buckets, cut into micro-batches at equal seconds, grouped into steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.core.rng import keyed_hash, keyed_seed
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.constraints import SHARE, Array, Rules
from data_pipeline.sampling.epoch import Entries, Layout

POPULOUS = 4
"""Micro-batches' worth of audio from which on a bucket is shuffled; a smaller one is sorted by length."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one micro-batch, n of them: shard number, row in the shard, samples to read, number of the repeat."""

    shard_n: Array
    row_n: Array
    length_n: Array
    repeat_n: Array

    @property
    def samples(self) -> int:
        return int(self.length_n.sum())

    @property
    def padded_samples(self) -> int:
        return int(self.length_n.max()) * len(self.length_n)


@dataclass(frozen=True)
class Window:
    """R rows in micro-batch order. first_K1: first row of each micro-batch. order_GV: the micro-batches of each step.

    spanning_K: micro-batches of more than one bucket; cropped: samples cut away to keep those within their room.
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
        """Micro-batch j of the window's own step number `step`."""
        k = self.order_GV[step, j]
        rows = slice(int(self.first_K1[k]), int(self.first_K1[k + 1]))
        return MicroBatch(self.shard_R[rows], self.row_R[rows], self.length_R[rows], self.repeat_R[rows])

    def samples(self, step: int) -> int:
        return int(self.samples_K[self.order_GV[step]].sum())

    def padded_samples(self, step: int) -> int:
        return int(self.padded_K[self.order_GV[step]].sum())


def plan_window(
    catalogue: Catalogue,
    entries: Entries,
    repeats: Array,
    rules: Rules,
    layout: Layout,
    number: int,
    key: tuple[int, int],
) -> Window:
    """Window `number`; `key` is (seed, epoch)."""
    shard_R, row_R, length_R, repeat_R, hash_R = _rows(catalogue, entries, repeats, rules, layout, number, key)
    steps = int(layout.step_W1[number + 1] - layout.step_W1[number])
    n_micro, total = steps * rules.micro_batches, int(length_R.sum())

    bucket_R = np.searchsorted(rules.edges, length_R, side="right") - 1
    audio_B = np.bincount(bucket_R, length_R, len(rules.edges))
    sparse_R = (audio_B * n_micro < POPULOUS * total)[bucket_R]
    order = np.lexsort((hash_R, np.where(sparse_R, length_R, 0), bucket_R))
    shard_R, row_R, length_R, repeat_R = shard_R[order], row_R[order], length_R[order], repeat_R[order]
    bucket_R = bucket_R[order]

    first_K1 = _cut(length_R, n_micro)
    begins, sizes = first_K1[:-1], np.diff(first_K1)
    spanning_K = bucket_R[begins] != bucket_R[first_K1[1:] - 1]
    shortest_K = np.minimum.reduceat(length_R, begins)
    room = rules.cap / (1 + rules.quadratic * rules.longest) if rules.cap else rules.room(total / n_micro)
    allowed_K = np.maximum((shortest_K * rules.ratio).astype(np.int64), (room / sizes).astype(np.int64))
    allowed_K = np.where(spanning_K, shortest_K if rules.crop else allowed_K, rules.longest)
    length_R = np.minimum(length_R, np.repeat(allowed_K, sizes))

    samples_K = np.add.reduceat(length_R, begins)
    padded_K = np.maximum.reduceat(length_R, begins) * sizes
    return Window(
        shard_R, row_R, length_R, repeat_R, first_K1, _steps(padded_K, steps, (*key, number)),
        samples_K, padded_K, spanning_K, total - int(length_R.sum()),
    )  # fmt: skip


def _rows(
    catalogue: Catalogue,
    entries: Entries,
    repeats: Array,
    rules: Rules,
    layout: Layout,
    number: int,
    key: tuple[int, int],
) -> tuple[Array, Array, Array, Array, Array]:
    """Shard, row, usable length, repeat number and random rank of all rows of a window."""
    parts: list[tuple[Array, ...]] = []
    mixed = bool((repeats != SHARE).any())
    for u in range(int(layout.window_W1[number]), int(layout.window_W1[number + 1])):
        s, turn, level = int(layout.shard_U[u]), int(layout.turn_U[u]), int(layout.level_U[u])
        span = slice(int(catalogue.starts_S[s]), int(catalogue.starts_S[s + 1]))
        used = rules.usable(np.asarray(catalogue.length_N[span]))
        rank = keyed_hash(keyed_seed(*key, turn, level, s, "rows"), np.arange(len(used)))
        take = used > 0
        if mixed:
            group = np.asarray(catalogue.group_N[span])
            whole = (repeats // SHARE)[group]
            for e in range(*np.searchsorted(entries.shard_E, [s, s + 1])):
                if layout.extra_TE[turn, e]:
                    g = entries.group_E[e]
                    rows = np.flatnonzero((group == g) & (used > 0))
                    if repeats[g] // SHARE == level:
                        chosen = rows[np.argsort(rank[rows], kind="stable")[: layout.extra_TE[turn, e]]]
                        whole[chosen] += 1
            take &= whole > level
        rows = np.flatnonzero(take)
        shard, repeat = np.full(len(rows), s, np.int64), np.full(len(rows), turn * layout.levels + level, np.int64)
        parts.append((shard, rows, used[rows].astype(np.int64), repeat, rank[rows]))
    shard_R, row_R, length_R, repeat_R, hash_R = (np.concatenate(column) for column in zip(*parts, strict=True))
    return shard_R, row_R, length_R, repeat_R, hash_R


def _cut(length_R: Array, n_micro: int) -> Array:
    """First row of each of `n_micro` stretches of nearly equal audio, none of them empty, and the end."""
    sums = np.concatenate([[0], np.cumsum(length_R)])
    # Python integers: k * total may pass 2**63.
    total = int(sums[-1])
    aims = np.array([k * total // n_micro for k in range(1, n_micro)], dtype=np.int64)
    above = np.clip(np.searchsorted(sums, aims), 1, len(sums) - 1)
    nearest = np.where(aims - sums[above - 1] <= sums[above] - aims, above - 1, above)
    k = np.arange(1, n_micro)
    nearest = np.maximum.accumulate(np.maximum(nearest, 1) - k) + k
    nearest = np.minimum(nearest, len(length_R) - n_micro + k)
    return np.concatenate([[0], nearest, [len(length_R)]]).astype(np.int64)


def _steps(padded_K: Array, steps: int, key: tuple[int, int, int]) -> Array:
    """Neighbours make a step, steps are shuffled; in a step the largest come first, so that the ranks of an
    accumulation slot, whatever their number, have nearly equal work."""
    order_GV = np.arange(len(padded_K)).reshape(steps, -1)
    within = np.argsort(-padded_K.reshape(steps, -1), axis=1, kind="stable")
    order_GV = np.take_along_axis(order_GV, within, axis=1)
    return order_GV[np.argsort(keyed_hash(keyed_seed(*key, "steps"), np.arange(steps)), kind="stable")]
