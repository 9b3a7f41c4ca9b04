"""An epoch in outline: which shards in which order, where windows end, how many steps each window makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.core.rng import keyed_hash, keyed_seed
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.constraints import MIN_STEPS, SHARE, Array, Rules


@dataclass(frozen=True)
class Entries:
    """Usable segments and samples per shard and group, E pairs sorted by shard and then group."""

    shard_E: Array
    group_E: Array
    count_E: Array
    samples_E: Array


@dataclass(frozen=True)
class Layout:
    """U units in order, W windows of them. A unit is a shard, or a part of it that is repeated.

    turn_U: which pass over the data; level_U: which repeat by mixing (level 0 holds every segment).
    extra_TE: segments of each entry that are repeated once more in each turn.
    window_W1: first unit of each window; step_W1: its first global step; samples: audio of the epoch (expected,
    where a part of a group is repeated).
    """

    shard_U: Array
    turn_U: Array
    level_U: Array
    extra_TE: Array
    window_W1: Array
    step_W1: Array
    samples: int

    @property
    def steps(self) -> int:
        return int(self.step_W1[-1])

    @property
    def levels(self) -> int:
        return int(self.level_U.max()) + 1


def summarize(catalogue: Catalogue, rules: Rules, grouped: bool) -> Entries:
    """One pass over all lengths, block by block. Without `grouped` all segments count as group 0."""
    n_groups = len(catalogue.groups) if grouped else 1
    found: list[tuple[Array, Array, Array]] = []
    for a, b in catalogue.blocks():
        first, last = int(catalogue.starts_S[a]), int(catalogue.starts_S[b])
        used = rules.usable(np.asarray(catalogue.length_N[first:last]))
        sizes = np.diff(catalogue.starts_S[a : b + 1])
        code = np.repeat(np.arange(b - a, dtype=np.int64) * n_groups, sizes)
        if grouped:
            code += catalogue.group_N[first:last]
        count = np.bincount(code[used > 0], minlength=(b - a) * n_groups)
        samples = np.bincount(code, used, minlength=(b - a) * n_groups).astype(np.int64)  # exact below 2**53
        full = np.flatnonzero(count)
        found.append((full + a * n_groups, count[full], samples[full]))
    code, count, samples = (np.concatenate(column) for column in zip(*found, strict=True))
    return Entries(code // n_groups, code % n_groups, count.astype(np.int64), samples)


def repeats_of(entries: Entries, n_groups: int, alpha: float) -> Array:
    """(G,) how often each group is seen per pass, in 1/SHARE: hours^alpha in proportion, and the largest group once."""
    repeats = np.full(n_groups, SHARE, dtype=np.int64)
    if alpha != 1:
        samples_G = np.bincount(entries.group_E, entries.samples_E, n_groups)
        for g in np.flatnonzero(samples_G):
            repeats[g] = round(float(samples_G.max() / samples_G[g]) ** (1 - alpha) * SHARE)
    return repeats


def lay_out(entries: Entries, repeats: Array, rules: Rules, seed: int, epoch: int) -> Layout:
    """The outline of `epoch`. Whole passes are repeated until the epoch has at least MIN_STEPS steps."""
    first = _one_pass(entries, repeats, seed, epoch, 0)
    total = int(first[3].sum())
    turns = max(1, -(-MIN_STEPS * rules.batch // total))
    passes = [first] + [_one_pass(entries, repeats, seed, epoch, turn) for turn in range(1, turns)]
    shard_U, level_U, count_U, samples_U = (np.concatenate([one[i] for one in passes]) for i in range(4))
    turn_U = np.repeat(np.arange(turns), [len(one[0]) for one in passes])
    enough = max(rules.batch, min(MIN_STEPS * rules.batch, total))
    ends = _window_ends(turn_U, count_U, samples_U, rules, enough)
    samples_W = _sums(samples_U)[ends]
    # Rounding the running total, not each window, keeps the epoch's mean exact.
    steps_W = np.diff((2 * samples_W + rules.batch) // (2 * rules.batch))
    steps_W = np.maximum(1, np.minimum(steps_W, np.diff(_sums(count_U)[ends]) // rules.micro_batches))
    extra_TE = np.stack([one[4] for one in passes])
    return Layout(shard_U, turn_U, level_U, extra_TE, ends, _sums(steps_W), int(samples_U.sum()))


def _sums(x: Array) -> Array:
    return np.concatenate([[0], np.cumsum(x)]).astype(np.int64)


def _one_pass(
    entries: Entries, repeats: Array, seed: int, epoch: int, turn: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Shard, level, count and samples of each unit in shuffled order; and the extra repeats of each entry."""
    whole_E, part_E = np.divmod(repeats[entries.group_E], SHARE)
    extra_E = np.zeros_like(entries.count_E)
    partial = np.flatnonzero(part_E)
    if len(partial):
        extra_E[partial] = _extra(entries, repeats, partial, keyed_seed(seed, epoch, turn, "extra"))
    columns: list[tuple[Array, Array, Array, Array]] = []
    for level in range(int(whole_E.max()) + 1):
        count_E = np.where(whole_E > level, entries.count_E, np.where(whole_E == level, extra_E, 0))
        at = np.flatnonzero(count_E)
        if not len(at):
            continue
        samples = (entries.samples_E[at] / entries.count_E[at] * count_E[at]).astype(np.int64)
        samples = np.where(count_E[at] == entries.count_E[at], entries.samples_E[at], samples)
        shards, begins = np.unique(entries.shard_E[at], return_index=True)
        count_U, samples_U = np.add.reduceat(count_E[at], begins), np.add.reduceat(samples, begins)
        columns.append((shards, np.full(len(shards), level), count_U, samples_U))
    shard_U, level_U, count_U, samples_U = (np.concatenate(column) for column in zip(*columns, strict=True))
    names = level_U * (int(entries.shard_E.max()) + 1) + shard_U
    order = np.argsort(keyed_hash(keyed_seed(seed, epoch, turn, "units"), names), kind="stable")
    return shard_U[order], level_U[order], count_U[order], samples_U[order], extra_E


def _extra(entries: Entries, repeats: Array, at: Array, key: int) -> Array:
    """Segments of the entries `at` that get one repeat more: shared out so that each group's total is exact."""
    order = np.lexsort((keyed_hash(key, entries.shard_E[at]), entries.group_E[at]))
    group, count = entries.group_E[at][order], entries.count_E[at][order]
    total_G = np.bincount(group, count, len(repeats)).astype(np.int64)
    wanted_G = (total_G * (repeats % SHARE) + SHARE // 2) // SHARE
    before = np.cumsum(count) - count
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    before -= np.repeat(before[starts], np.diff(np.append(starts, len(group))))
    total, wanted = total_G[group], wanted_G[group]
    extra = np.empty_like(count)
    extra[order] = (before + count) * wanted // total - before * wanted // total
    return extra


def _window_ends(turn_U: Array, count_U: Array, samples_U: Array, rules: Rules, enough: int) -> Array:
    """Cuts after every `rules.window` units of a pass, but never before a window holds `enough` audio."""
    candidates: list[int] = []
    for turn in range(int(turn_U[-1]) + 1):
        a, b = (int(x) for x in np.searchsorted(turn_U, [turn, turn + 1]))
        pieces = -(-(b - a) // rules.window)
        candidates += [a + (b - a) * (i + 1) // pieces for i in range(pieces)]
    samples, counts = _sums(samples_U), _sums(count_U)
    ends = [0]
    for end in candidates:
        if samples[end] - samples[ends[-1]] >= enough and counts[end] - counts[ends[-1]] >= rules.micro_batches:
            ends.append(end)
    if len(ends) == 1:
        ends.append(candidates[-1])
    ends[-1] = candidates[-1]
    return np.array(ends, dtype=np.int64)
