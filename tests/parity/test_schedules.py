"""Learning rate schedules against transformers and fairseq's formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.lr_schedule import learning_rate
from tests.support.parity_table import Parity

optimization = pytest.importorskip("transformers.optimization")
WARM_UP, TOTAL, LR = 20, 100, 5e-4


def theirs(name: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    make = getattr(optimization, f"get_{name}_schedule_with_warmup")
    arguments = (optimizer, WARM_UP) if name == "constant" else (optimizer, WARM_UP, TOTAL)
    schedule = make(*arguments)
    rates = []
    for _ in range(TOTAL):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_equal_those_of_transformers(name: str, parity: Parity) -> None:
    """Our first update has a rate above 0, that of transformers has rate 0: the curves differ by one update."""
    config = ScheduleConfig(name=name, warmup_steps=WARM_UP)
    ours = [learning_rate(OptimizerConfig(lr=LR), config, TOTAL, step) for step in range(TOTAL)]
    error = max(abs(a - b) for a, b in zip(ours, theirs(name), strict=True)) / LR
    parity("schedules linear, cosine, constant against transformers", 1e-6, error)


def test_tri_stage_and_noam_equal_their_formulas(parity: Parity) -> None:
    """fairseq `tri_stage`: warm up, hold, decay to 1 % of the peak; Noam: peak · sqrt(warm-up / update)."""
    tri = ScheduleConfig(name="tri_stage", warmup_steps=3, hold_fraction=0.9)
    noam = ScheduleConfig(name="noam", warmup_steps=25)
    decay = -math.log(0.01) / 7
    worst = 0.0
    for step in range(TOTAL):
        update = step + 1
        expected = LR * min(update / 3, 1.0, math.exp(-decay * max(0, update - 93)))
        worst = max(worst, abs(learning_rate(OptimizerConfig(lr=LR), tri, TOTAL, step) - expected) / LR)
        expected = LR * min(update / 25, math.sqrt(25 / update))
        worst = max(worst, abs(learning_rate(OptimizerConfig(lr=LR), noam, TOTAL, step) - expected) / LR)
    parity("schedules tri-stage and Noam against their formulas", 1e-6, worst)
