"""Learning-rate schedules: pure functions of the step, so every engine and every resume sees the same rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import OptimizerConfig, ScheduleConfig

REWARM_SHARE = 0.1
"""Most that a second warm-up takes of the steps that are left."""


@dataclass(frozen=True)
class Prolongation:
    """The moment at which a resumed run found train.steps changed."""

    step: int
    """Updates done before it."""
    rate: float
    """Learning rate of the last of them."""


def learning_rate(
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    total_steps: int,
    step: int,
    prolonged: Prolongation | None = None,
) -> float:
    """Returns the learning rate of the update after `step` earlier ones.

    Args:
        optimizer: Has the peak.
        schedule: Has the shape; `continuation` applies from `prolonged` on.
        total_steps: train.steps.
        step: Updates done.
        prolonged: Where train.steps was changed in a resume, if it was.
    """
    planned = _planned(optimizer, schedule, total_steps, step)
    if prolonged is None or step < prolonged.step or schedule.continuation == "as_planned":
        return planned
    if schedule.continuation == "constant":
        return prolonged.rate
    length = min(schedule.warmup_steps, round(REWARM_SHARE * (total_steps - prolonged.step)))
    share = min(1.0, (step - prolonged.step + 1) / max(1, length))
    return prolonged.rate + share * (planned - prolonged.rate)


def _planned(optimizer: OptimizerConfig, schedule: ScheduleConfig, total_steps: int, step: int) -> float:
    """Returns the planned rate, without resumes.

    linear, cosine: warm up, then decay to `final_scale` at `total_steps`. tri_stage (wav2vec 2.0 fine-tuning,
    data2vec): warm up, hold, exponential decay (1 % of the peak when `final_scale` is 0). noam (Vaswani et al.
    2017): warm up, then inverse square root.
    """
    update = step + 1
    warmup = schedule.warmup_steps
    if update <= warmup:
        return optimizer.lr * update / warmup
    done = min(1.0, (update - warmup) / max(1, total_steps - warmup))
    return optimizer.lr * _decay(schedule, total_steps, update, done)


def _decay(schedule: ScheduleConfig, total_steps: int, update: int, done: float) -> float:
    final = schedule.final_scale
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * done
        case "cosine":
            return final + (1.0 - final) * (1.0 + math.cos(math.pi * done)) / 2.0
        case "noam":
            return math.sqrt(max(1, schedule.warmup_steps) / update)
        case "tri_stage":
            hold_end = schedule.warmup_steps + schedule.hold_fraction * total_steps
            if update <= hold_end:
                return 1.0
            decay_steps = max(1.0, total_steps - hold_end)
            return float((final or 0.01) ** min(1.0, (update - hold_end) / decay_steps))
