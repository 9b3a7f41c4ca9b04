"""Each objective on two ranks under ZeRO 1 and 3, teachers and code books included, against plain torch on one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.cases import FRONTENDS, OBJECTIVES, small
from tests.distributed.test_engines import run

STEPS = 4


def case(objective: str, engine: str, stage: int = 1) -> dict[str, Any]:
    config = {
        "data": {"shards": "synthetic", "micro_batches": 4},
        "frontend": FRONTENDS["log_mel"],
        "encoder": small("encoders", "transformer", layer_drop=0.3),
        "objective": small("objectives", objective),
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": STEPS},
        "engine": {"name": engine, "zero_stage": stage},
    }
    return {"config": config, "steps": STEPS}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp = tmp_path_factory.mktemp("objectives")
    one = {name: case(name, "local") for name in OBJECTIVES}
    two = {f"{name}, zero {stage}": case(name, "deepspeed", stage) for name in OBJECTIVES for stage in (1, 3)}
    return run(tmp, "one", 1, one) | run(tmp, "two", 2, two)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_those_of_one_rank(measured: dict[str, Any], objective: str, stage: int) -> None:
    found, expected = measured[f"{objective}, zero {stage}"], measured[objective]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
