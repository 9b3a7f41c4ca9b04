"""Learning-rate schedules: pure functions of the step, so every engine and every resume sees the same rate."""

from __future__ import annotations

import math

from pretrain.config import OptimizerConfig, ScheduleConfig


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, total_steps: int, step: int) -> float:
    """The rate for the update after `step` earlier ones.

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
