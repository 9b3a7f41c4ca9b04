"""Computes scalars and histograms of one step from its sums."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping

import numpy as np
import torch

from data_pipeline.core.types import SAMPLE_RATE, Step
from pretrain.engines.base import HeldOutResult, NumpySum, StepResult
from pretrain.interfaces.monitoring import CODE_COUNTS, MonitoringRecord
from pretrain.nn.balance import TASK_GRADIENTS
from pretrain.train_module import TrainModule

RANKS_SHOWN = 64
"""Ranks up to which each has a curve of data waits; with more, only the slowest has."""


def step_scalars(
    result: StepResult,
    step: Step,
    lr: float,
    seconds: float,
    world: int,
    module: TrainModule,
) -> dict[str, float]:
    """Returns the logged scalars of one optimizer step.

    Args:
        result: sums over all ranks.
        step: the step's data, for padding and epoch.
        lr: learning rate.
        seconds: wall time of the step.
        world: number of ranks.
        module: the module in training, for the meaning of its metrics.
    """
    scalars = {"loss/total": result.loss, "opt/lr": lr, "opt/grad_norm": result.grad_norm}
    scalars |= means(result.metrics, module.objective.monitoring())
    shares = module.gradient_shares(result.metrics)
    scalars |= {f"balance/share/{task}": share for task, share in shares.items()}
    for head, name in module.infeasible_metrics().items():
        unusable, labelled = result.metrics[name]
        scalars[f"data/usable_segments/{head}"] = labelled - float(np.ravel(unusable)[0])
    scalars |= {
        "perf/step_seconds": seconds,
        "perf/audio_seconds_per_second": result.samples / SAMPLE_RATE / seconds,
        "perf/memory_gib": peak_memory_gib(),
        "perf/data_wait_share": min(1.0, sum(result.signals.wait_seconds) / world / seconds),
        **data_waits(result, seconds, world),
        "data/audio_seconds": result.samples / SAMPLE_RATE,
        "data/padding_share": 1.0 - step.samples / step.padded_samples,
        "data/skipped_segments": float(result.signals.skipped_segments),
        "data/epoch": float(step.after.epoch),
    }
    return scalars


def held_out_scalars(result: HeldOutResult, record: MonitoringRecord) -> dict[str, float]:
    """Returns the logged scalars of held-out audio with targets: losses, accuracies and code use, under valid/."""
    scalars = means(result.metrics, record)
    if any(name.startswith("loss/") for name in scalars):  # a loss over no target at all would be 0
        scalars["loss/total"] = result.loss
    return {f"valid/{name}": value for name, value in scalars.items() if name.startswith(("loss/", "metric/"))}


def means(metrics: Mapping[str, NumpySum], record: MonitoringRecord) -> dict[str, float]:
    """Returns the mean of each metric with a count, and perplexity and use of each code book."""
    scalars: dict[str, float] = {}
    for name, (total, count) in metrics.items():
        if name in record.count_metrics:
            scalars.update(code_use(name, total))
        elif count > 0 and name != TASK_GRADIENTS:
            scalars[name] = float(total[0]) / count
    return scalars


def data_waits(result: StepResult, seconds: float, world: int) -> dict[str, float]:
    """Returns the share of the step that each rank waited for data and, if there are several, the slowest rank."""
    waits = [min(1.0, waited / seconds) for waited in result.signals.wait_seconds]
    if world == 1:
        return {}
    worst = max(range(world), key=waits.__getitem__)
    found = {"perf/data_wait_share_worst": waits[worst], "perf/data_wait_worst_rank": float(worst)}
    if world <= RANKS_SHOWN:
        found |= {f"perf/data_wait_share/rank_{rank}": share for rank, share in enumerate(waits)}
    return found


def peak_memory_gib() -> float:
    """Returns the peak memory of this process in GiB, on its GPU if it has one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def code_use(name: str, counts: np.ndarray) -> dict[str, float]:
    """Returns the perplexity and the share of used codes of a code book from the step's counts per code."""
    suffix = name.removeprefix(CODE_COUNTS)
    share = counts / max(1.0, float(counts.sum()))
    used = share[share > 0]
    entropy = float(-(used * np.log(used)).sum())
    return {f"metric/perplexity{suffix}": math.exp(entropy), f"metric/code_usage{suffix}": len(used) / len(share)}


def histograms(metrics: Mapping[str, NumpySum], record: MonitoringRecord) -> dict[str, np.ndarray]:
    """Returns the counts per code of the objective's code books, by metric."""
    return {name: total for name, (total, _) in metrics.items() if name in record.count_metrics}
