"""Each objective and each encoder's options on two ranks under ZeRO 1 and 3 against plain torch on one rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.cases import ENCODERS, FRONTENDS, OBJECTIVES, small
from tests.distributed.test_engines import run

STEPS = 4
OPTIONS = {
    "layers": 4,
    "half_rate_blocks": 2,
    "attention": "local_global",
    "window": 8,
    "registers": 2,
    "full_every": 2,
    "stochastic_depth": 0.2,
}


def optional(encoder: str, engine: str, stage: int = 1) -> dict[str, Any]:
    """Packed rows, selective recomputing and whatever a stack of blocks can be told, all at once."""
    made = case("best_rq", engine, stage)
    made["config"]["encoder"] = small("encoders", encoder, **OPTIONS)
    made["config"]["engine"] |= {"packed": True, "activation_checkpointing": "selective"}
    return made


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
    cases = dict.fromkeys(OBJECTIVES, case) | dict.fromkeys(ENCODERS, optional)
    one = {name: make(name, "local") for name, make in cases.items()}
    two = {f"{name}, zero {stage}": make(name, "deepspeed", stage) for name, make in cases.items() for stage in (1, 3)}
    return run(tmp, "one", 1, one) | run(tmp, "two", 2, two)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", [*OBJECTIVES, *ENCODERS])
def test_losses_are_those_of_one_rank(measured: dict[str, Any], name: str, stage: int) -> None:
    found, expected = measured[f"{name}, zero {stage}"], measured[name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
