"""Summarises a planned epoch: steps, hours, padding, shapes, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.constraints import SHARE
from data_pipeline.sampling.epoch import repeats_of, summarize
from data_pipeline.sampling.plan import Plan, accumulation, useful_worlds

HOUR = 3600 * SAMPLE_RATE
SAMPLED_WINDOWS = 40


@dataclass(frozen=True)
class GroupHours:
    """Hours of one corpus and language: in the shards (usable), and in one epoch with its repeats.

    text: whether its segments have a text; False where `data.text_share` does not divide them.
    """

    corpus: str
    language: str
    text: bool
    segments: int
    hours: float
    epoch_hours: float


@dataclass(frozen=True)
class PlanReport:
    """Figures of one epoch; those per micro-batch are from `sampled_windows` of its windows."""

    plan_hash: str
    shards: int
    segments: int
    left_out_segments: int
    groups: Sequence[GroupHours]
    steps: int
    passes: int
    hours: float
    seconds_per_step: float
    least_seconds_per_step: float
    most_seconds_per_step: float
    segments_per_step: float
    padding: float
    cropped: float
    """Share of audio that is cropped in micro-batches that span buckets (without crops to max_seconds)."""
    spanning: float
    """Share of micro-batches with more than one length bucket."""
    shapes: Sequence[tuple[float, float, int, int]]
    """Deciles of micro-batches: (longest segment in seconds from, to, fewest rows, most rows)."""
    distinct_shapes: int
    largest_micro_batch_seconds: float
    host_bytes: int
    """Upper bound of the shared memory and prefetched steps of one rank, in bytes."""
    windows: int
    sampled_windows: int
    worlds: Sequence[int]


def describe_plan(plan: Plan, config: DataConfig, world: int = 1) -> PlanReport:
    """Returns the figures of the first epoch of `plan`, read by `world` ranks."""
    catalogue, constraints, layout = plan.catalogue, plan.constraints, plan.layout(0)
    entries = summarize(catalogue, constraints, grouped=True)
    repeats = repeats_of(entries, max(1, len(catalogue.groups)), constraints.alpha)
    if constraints.text_share:
        repeats = plan.repeats_G
    passes = layout.turns
    count_G = np.bincount(entries.group_E, entries.count_E, len(repeats))
    samples_G = np.bincount(entries.group_E, entries.samples_E, len(repeats))
    groups = [
        GroupHours(*name, int(count_G[g]), samples_G[g] / HOUR, samples_G[g] / HOUR * repeats[g] / SHARE * passes)
        for g, name in enumerate(catalogue.groups)
    ]
    n_windows = layout.windows
    chosen = np.unique(np.linspace(0, n_windows - 1, min(n_windows, SAMPLED_WINDOWS)).astype(int))
    windows = [plan.window(0, int(number)) for number in chosen]
    samples, padded, rows, spanning = (
        np.concatenate(columns)
        for columns in zip(
            *((w.samples_K, w.padded_K, np.diff(w.first_K1), w.spanning_K) for w in windows), strict=True
        )
    )
    per_step = np.concatenate([w.samples_K[w.order_GV].sum(axis=1) for w in windows]) / SAMPLE_RATE
    longest = padded // rows
    used = int(count_G.sum())
    return PlanReport(
        plan_hash=plan.hash,
        shards=len(catalogue.shards),
        segments=used,
        left_out_segments=int(catalogue.starts_S[-1]) - used,
        groups=sorted(groups, key=lambda group: -group.hours),
        steps=layout.steps,
        passes=passes,
        hours=layout.samples / HOUR,
        seconds_per_step=float(per_step.mean()),
        least_seconds_per_step=float(per_step.min()),
        most_seconds_per_step=float(per_step.max()),
        segments_per_step=float(rows.sum() / len(per_step)),
        padding=float(1 - samples.sum() / padded.sum()),
        cropped=sum(w.cropped for w in windows) / float(samples.sum()),
        spanning=float(spanning.mean()),
        shapes=_shapes(longest, rows),
        distinct_shapes=len(Counter(zip(longest.tolist(), rows.tolist(), strict=True))),
        largest_micro_batch_seconds=float(padded.max()) / SAMPLE_RATE,
        host_bytes=_host_bytes(plan, config, world),
        windows=n_windows,
        sampled_windows=len(windows),
        worlds=useful_worlds(constraints.micro_batches),
    )


def _shapes(longest_K: np.ndarray, rows_K: np.ndarray) -> list[tuple[float, float, int, int]]:
    order = np.argsort(longest_K, kind="stable")
    tenths = [part for part in np.array_split(order, 10) if len(part)]
    seconds = longest_K / SAMPLE_RATE
    return [
        (float(seconds[t].min()), float(seconds[t].max()), int(rows_K[t].min()), int(rows_K[t].max())) for t in tenths
    ]


def _host_bytes(plan: Plan, config: DataConfig, world: int) -> int:
    constraints = plan.constraints
    slots = accumulation(constraints.micro_batches, world)
    step = int(4 * slots * constraints.ordinary_limit(constraints.batch / constraints.micro_batches))
    if not config.workers:
        return step
    ahead = max(2, -(-config.prefetch * slots // config.workers)) + 2
    return 4 * plan.largest_micro_batch() * (1 + config.sources) * ahead * config.workers + 3 * step


def to_text(report: PlanReport) -> str:
    """Returns the report as text for a terminal."""
    looked = "" if report.windows == report.sampled_windows else f" ({report.sampled_windows} windows sampled)"
    repeated = f", {report.passes} passes over the data" if report.passes > 1 else ""
    lines = [
        f"plan       {report.plan_hash}",
        f"data       {report.segments:,} segments in {report.shards:,} shards; {report.left_out_segments:,} too short",
        f"epoch      {report.steps:,} steps, {report.hours:,.2f} h in {report.windows:,} windows{repeated}",
        f"step       {report.seconds_per_step:,.1f} s of audio ({report.least_seconds_per_step:,.1f} to "
        f"{report.most_seconds_per_step:,.1f}) in {report.segments_per_step:.0f} segments{looked}",
        f"padding    {report.padding:.2%}; {report.spanning:.2%} of micro-batches span length buckets, "
        f"{report.cropped:.2%} of the audio cropped there",
        f"shapes     {report.distinct_shapes:,} different; the largest micro-batch holds "
        f"{report.largest_micro_batch_seconds:.1f} s with padding",
        f"memory     up to {report.host_bytes / 2**20:,.0f} MiB per rank for batches in flight",
        f"ranks      {', '.join(map(str, report.worlds))}",
        "",
        f"{'corpus':20} {'language':10} {'segments':>12} {'hours':>12} {'per epoch':>12}",
    ]
    lines += [
        f"{group.corpus + ' (text)' * group.text:20} {group.language:10} {group.segments:12,} {group.hours:12,.2f} "
        f"{group.epoch_hours:12,.2f}"
        for group in report.groups
    ]
    lines += ["", "micro-batches, a tenth each: length of the longest segment, rows"]
    lines += [f"  {low:6.2f} to {high:6.2f} s   {few:3} to {many:3} rows" for low, high, few, many in report.shapes]
    return "\n".join(lines)
