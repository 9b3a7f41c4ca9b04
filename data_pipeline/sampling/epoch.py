"""The layout of an epoch: the order of its shards, the windows they form, and the number of steps of each window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.core.rng import keyed_hash, keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.constraints import MIN_STEPS, SHARE, Array, BatchConstraints
from data_pipeline.sampling.window import Rows, Window, build_window


@dataclass(frozen=True)
class Entries:
    """Usable segments and samples per shard and group: E pairs sorted by shard and then group."""

    shard_E: Array
    group_E: Array
    count_E: Array
    samples_E: Array

    @property
    def samples(self) -> int:
        """Usable audio samples in total."""
        return int(self.samples_E.sum())


@dataclass(frozen=True)
class PlanInputs:
    """All inputs that determine a plan.

    entries: usable audio per shard and group.  repeats_G: repeats of each group per pass, in 1/SHARE.
    """

    catalogue: Catalogue
    constraints: BatchConstraints
    seed: int
    entries: Entries
    repeats_G: Array


@dataclass(frozen=True)
class EpochLayout:
    """U units in order, in W windows. A unit is a shard, or a part of it that is repeated.

    turn_U: the pass over the data that a unit belongs to; level_U: its repeat by mixing (level 0 has every segment).
    extra_TE: segments of each entry that are repeated once more in each turn.
    window_W1: first unit of each window; step_W1: first global step of each window.
    samples: audio of the epoch (expected, where a part of a group is repeated).
    """

    inputs: PlanInputs
    epoch: int
    shard_U: Array
    turn_U: Array
    level_U: Array
    extra_TE: Array
    window_W1: Array
    step_W1: Array
    samples: int

    @property
    def steps(self) -> int:
        """Global steps of the epoch."""
        return int(self.step_W1[-1])

    @property
    def windows(self) -> int:
        """Windows of the epoch."""
        return len(self.step_W1) - 1

    @property
    def turns(self) -> int:
        """Passes over the data."""
        return int(self.turn_U.max()) + 1

    @property
    def levels(self) -> int:
        """Repeats by mixing, including the first."""
        return int(self.level_U.max()) + 1

    def plan_window(self, number: int) -> Window:
        """Returns window `number`: its rows in micro-batches and steps, planned from its own shards alone."""
        steps = int(self.step_W1[number + 1] - self.step_W1[number])
        key = (self.inputs.seed, self.epoch, number)
        return build_window(self._rows(number), constraints=self.inputs.constraints, steps=steps, key=key)

    def _rows(self, number: int) -> Rows:
        """Returns all rows of a window, shard by shard."""
        units = range(int(self.window_W1[number]), int(self.window_W1[number + 1]))
        parts = [self._rows_of_unit(u) for u in units]
        return Rows(*(np.concatenate(column) for column in zip(*(part.columns for part in parts), strict=True)))

    def _rows_of_unit(self, u: int) -> Rows:
        s, turn, level = int(self.shard_U[u]), int(self.turn_U[u]), int(self.level_U[u])
        catalogue = self.inputs.catalogue
        span = slice(int(catalogue.starts_S[s]), int(catalogue.starts_S[s + 1]))
        used = self.inputs.constraints.usable(np.asarray(catalogue.length_N[span]))
        seed = keyed_seed(self.inputs.seed, self.epoch, turn, level, s, "rows")
        rank = keyed_hash(seed, np.arange(len(used)))
        take = used > 0
        if (self.inputs.repeats_G != SHARE).any():
            group = np.asarray(catalogue.group_N[span])
            take &= self._times(s, turn=turn, level=level, group=group, usable=take, rank=rank) > level
        text = catalogue.text_G[np.asarray(catalogue.group_N[span])] if catalogue.text_G.any() else np.zeros_like(take)
        rows = np.flatnonzero(take)
        return Rows(
            shard_R=np.full(len(rows), s, np.int64),
            row_R=rows,
            length_R=used[rows].astype(np.int64),
            repeat_R=np.full(len(rows), turn * self.levels + level, np.int64),
            rank_R=rank[rows],
            text_R=text[rows],
        )

    def _times(self, s: int, *, turn: int, level: int, group: Array, usable: Array, rank: Array) -> Array:
        """Returns how often each row of shard `s` occurs in this turn, limited to the repeats relevant for `level`."""
        repeats_G, entries = self.inputs.repeats_G, self.inputs.entries
        times = (repeats_G // SHARE)[group]
        for e in range(*np.searchsorted(entries.shard_E, [s, s + 1])):
            g, extra = entries.group_E[e], self.extra_TE[turn, e]
            if extra and repeats_G[g] // SHARE == level:
                rows = np.flatnonzero((group == g) & usable)
                times[rows[np.argsort(rank[rows], kind="stable")[:extra]]] += 1
        return times


def summarize(catalogue: Catalogue, constraints: BatchConstraints, grouped: bool) -> Entries:
    """Counts usable segments and samples in one pass over all lengths, block by block.

    Args:
        catalogue: groups and lengths of all segments.
        constraints: which lengths are usable.
        grouped: whether to count by group; otherwise all segments count as group 0.
    """
    n_groups = len(catalogue.groups) if grouped else 1
    found: list[tuple[Array, Array, Array]] = []
    for a, b in catalogue.blocks():
        first, last = int(catalogue.starts_S[a]), int(catalogue.starts_S[b])
        used = constraints.usable(np.asarray(catalogue.length_N[first:last]))
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
    """Returns the repeats of each group per pass, (G,), in 1/SHARE: proportional to hours^alpha, 1 for the largest."""
    repeats = np.full(n_groups, SHARE, dtype=np.int64)
    if alpha != 1:
        samples_G = np.bincount(entries.group_E, entries.samples_E, n_groups)
        for g in np.flatnonzero(samples_G):
            repeats[g] = round(float(samples_G.max() / samples_G[g]) ** (1 - alpha) * SHARE)
    return repeats


def with_text_share(repeats_G: Array, entries: Entries, text_G: Array, share: float) -> Array:
    """Returns the repeats with which `share` of the audio has a text; no segment is repeated less often than before.

    Args:
        repeats_G: repeats of each group per pass, in 1/SHARE.
        entries: usable samples by shard and group.
        text_G: whether the segments of a group have a text.
        share: of the audio of an epoch.

    Raises:
        ConfigError: no usable segment has a text, or each one has.
    """
    audio_G = np.bincount(entries.group_E, entries.samples_E, len(repeats_G)) * repeats_G
    texts, others = float(audio_G[text_G].sum()), float(audio_G[~text_G].sum())
    if not texts or not others:
        found = "no segment with a text" if not texts else "a text of each segment"
        raise ConfigError(
            f"data.text_share={share:g}: the shards have {found}, among segments of data.min_seconds to "
            "data.max_seconds; set data.text_share=0"
        )
    factor = share / (1 - share) * others / texts
    raised_G = text_G if factor >= 1 else ~text_G
    return np.where(raised_G, np.rint(repeats_G * max(factor, 1 / factor)).astype(np.int64), repeats_G)


def lay_out(inputs: PlanInputs, epoch: int) -> EpochLayout:
    """Returns the layout of `epoch`. Whole passes are repeated until the epoch has at least MIN_STEPS steps."""
    constraints = inputs.constraints
    first = _one_pass(inputs, epoch, turn=0)
    total = int(first.samples_U.sum())
    turns = max(1, -(-MIN_STEPS * constraints.batch // total))
    passes = [first] + [_one_pass(inputs, epoch, turn) for turn in range(1, turns)]
    count_U = np.concatenate([one.count_U for one in passes])
    samples_U = np.concatenate([one.samples_U for one in passes])
    turn_U = np.repeat(np.arange(turns), [len(one.shard_U) for one in passes])
    enough = max(constraints.batch, min(MIN_STEPS * constraints.batch, total))
    window = constraints.window
    if constraints.text_share:  # repeats are of the same shards; a window has as many first readings as without them
        window *= -(-len(first.level_U) // max(1, int((first.level_U == 0).sum())))
    ends = _window_ends(turn_U, count_U, samples_U, constraints, enough, window)
    samples_W = _sums(samples_U)[ends]
    # Rounding the running total, not each window, keeps the epoch's mean exact.
    steps_W = np.diff((2 * samples_W + constraints.batch) // (2 * constraints.batch))
    steps_W = np.maximum(1, np.minimum(steps_W, np.diff(_sums(count_U)[ends]) // constraints.micro_batches))
    return EpochLayout(
        inputs=inputs,
        epoch=epoch,
        shard_U=np.concatenate([one.shard_U for one in passes]),
        turn_U=turn_U,
        level_U=np.concatenate([one.level_U for one in passes]),
        extra_TE=np.stack([one.extra_E for one in passes]),
        window_W1=ends,
        step_W1=_sums(steps_W),
        samples=int(samples_U.sum()),
    )


@dataclass(frozen=True)
class _Pass:
    """One pass over the data: its units in shuffled order, and the additional repeats of each entry."""

    shard_U: Array
    level_U: Array
    count_U: Array
    samples_U: Array
    extra_E: Array


def _one_pass(inputs: PlanInputs, epoch: int, turn: int) -> _Pass:
    entries, seed = inputs.entries, inputs.seed
    whole_E, part_E = np.divmod(inputs.repeats_G[entries.group_E], SHARE)
    extra_E = np.zeros_like(entries.count_E)
    partial = np.flatnonzero(part_E)
    if len(partial):
        extra_E[partial] = _extra(inputs, partial, keyed_seed(seed, epoch, turn, "extra"))
    text_E = inputs.catalogue.text_G[entries.group_E]
    columns: list[tuple[Array, ...]] = []
    for level in range(int(whole_E.max()) + 1):
        count_E = np.where(whole_E > level, entries.count_E, np.where(whole_E == level, extra_E, 0))
        at = np.flatnonzero(count_E)
        if not len(at):
            continue
        samples = (entries.samples_E[at] / entries.count_E[at] * count_E[at]).astype(np.int64)
        samples = np.where(count_E[at] == entries.count_E[at], entries.samples_E[at], samples)
        shards, begins = np.unique(entries.shard_E[at], return_index=True)
        count_U, samples_U = np.add.reduceat(count_E[at], begins), np.add.reduceat(samples, begins)
        text_U = np.add.reduceat(np.where(text_E[at], samples, 0), begins)
        columns.append((shards, np.full(len(shards), level), count_U, samples_U, text_U))
    shard_U, level_U, count_U, samples_U, text_U = (np.concatenate(column) for column in zip(*columns, strict=True))
    names = level_U * (int(entries.shard_E.max()) + 1) + shard_U
    order = np.argsort(keyed_hash(keyed_seed(seed, epoch, turn, "units"), names), kind="stable")
    if inputs.constraints.text_share:
        order = _evenly(order, text_U, samples_U)
    return _Pass(shard_U[order], level_U[order], count_U[order], samples_U[order], extra_E)


def _evenly(order: Array, text_U: Array, samples_U: Array) -> Array:
    """Returns the units of `order` so that any first part of them has nearly the same share of audio with texts."""
    total, text = int(samples_U.sum()), int(text_U.sum())
    rich_U = text_U / samples_U > text / total
    rich, poor = order[rich_U[order]].tolist()[::-1], order[~rich_U[order]].tolist()[::-1]
    made: list[int] = []
    heard, with_text = 0, 0
    while rich or poor:
        lacks = with_text * total <= text * heard  # Python integers: products may exceed 2**63
        unit = (rich if rich and (lacks or not poor) else poor).pop()
        made.append(unit)
        heard, with_text = heard + int(samples_U[unit]), with_text + int(text_U[unit])
    return np.array(made, dtype=np.int64)


def _extra(inputs: PlanInputs, at: Array, key: int) -> Array:
    """Returns the number of segments of each entry in `at` to repeat once more; each group's total is exact."""
    entries, repeats_G = inputs.entries, inputs.repeats_G
    order = np.lexsort((keyed_hash(key, entries.shard_E[at]), entries.group_E[at]))
    group, count = entries.group_E[at][order], entries.count_E[at][order]
    total_G = np.bincount(group, count, len(repeats_G)).astype(np.int64)
    wanted_G = (total_G * (repeats_G % SHARE) + SHARE // 2) // SHARE
    before = np.cumsum(count) - count
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    before -= np.repeat(before[starts], np.diff(np.append(starts, len(group))))
    total, wanted = total_G[group], wanted_G[group]
    extra = np.empty_like(count)
    extra[order] = (before + count) * wanted // total - before * wanted // total
    return extra


def _window_ends(
    turn_U: Array, count_U: Array, samples_U: Array, constraints: BatchConstraints, enough: int, window: int
) -> Array:
    """Returns the ends of windows: after every `window` units of a pass, with at least `enough` audio."""
    candidates: list[int] = []
    for turn in range(int(turn_U[-1]) + 1):
        a, b = (int(x) for x in np.searchsorted(turn_U, [turn, turn + 1]))
        pieces = -(-(b - a) // window)
        candidates += [a + (b - a) * (i + 1) // pieces for i in range(pieces)]
    samples, counts = _sums(samples_U), _sums(count_U)
    ends = [0]
    for end in candidates:
        has_audio = samples[end] - samples[ends[-1]] >= enough
        if has_audio and counts[end] - counts[ends[-1]] >= constraints.micro_batches:
            ends.append(end)
    if len(ends) == 1:
        ends.append(candidates[-1])
    ends[-1] = candidates[-1]
    return np.array(ends, dtype=np.int64)


def _sums(x: Array) -> Array:
    return np.concatenate([[0], np.cumsum(x)]).astype(np.int64)
