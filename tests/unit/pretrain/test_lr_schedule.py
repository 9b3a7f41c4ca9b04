from __future__ import annotations

import itertools

import pytest

from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.lr_schedule import learning_rate

PEAK = OptimizerConfig(lr=1.0)


def rates(name: str, **settings: float) -> list[float]:
    schedule = ScheduleConfig(name=name, warmup_steps=10, **settings)  # type: ignore[arg-type]
    return [learning_rate(PEAK, schedule, 100, step) for step in range(100)]


@pytest.mark.parametrize("name", ["linear", "cosine", "tri_stage", "noam", "constant"])
def test_every_schedule_warms_up_linearly_and_never_exceeds_the_peak(name: str) -> None:
    found = rates(name)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(found) == pytest.approx(1.0)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found[9:]))


def test_final_rate_of_each_schedule() -> None:
    assert rates("linear")[-1] == pytest.approx(0.0)
    assert rates("linear", final_scale=0.1)[-1] == pytest.approx(0.1)
    assert rates("cosine")[-1] == pytest.approx(0.0)
    assert rates("cosine")[54] == pytest.approx(0.5, abs=0.01)
    assert rates("constant")[-1] == 1.0
    assert rates("noam")[39] == pytest.approx(0.5)  # four times the warm-up: half the peak


def test_tri_stage_holds_then_decays_to_a_hundredth() -> None:
    found = rates("tri_stage", hold_fraction=0.4)
    assert found[10:50] == pytest.approx([1.0] * 40)
    assert found[-1] == pytest.approx(0.01)


def test_without_warm_up_the_first_update_has_the_peak() -> None:
    assert learning_rate(PEAK, ScheduleConfig(name="constant", warmup_steps=0), 10, 0) == 1.0
