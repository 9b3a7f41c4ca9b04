"""Tuned weights beside a frozen model: exact resumes, and ZeRO 0 to 3 on two ranks as plain torch on one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import load
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import read_weights
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.train_module import build_model
from tests.support import engine_runs
from tests.support.engine_cases import run_case
from tests.support.engine_runs import run

WAYS = ("prompt", "lora", "adapter", "bias")
"""Of ZeRO 0 to 3."""


def case(way: str, engine: str, stage: int = 1, **more: Any) -> dict[str, Any]:
    """Returns a case of BEST-RQ of which the objective and the weights of `way` learn."""
    made = copy.deepcopy(engine_runs.case(engine, stage, **more))
    made["config"]["encoder"]["layer_drop"] = 0.0
    made["config"]["tune"] = {"name": way}
    return made


@pytest.mark.parametrize("way", ["prompt", "lora"])
def test_a_resume_has_the_same_bits_and_frozen_weights_stay(way: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world = DistributedContext()
    whole = run_case(case(way, "torch"), world)
    run_case(case(way, "torch", save=str(tmp_path)) | {"steps": 2}, world)
    resumed = run_case(case(way, "torch", load=str(tmp_path)), world)
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["digest"] == whole["digest"]
    found, config = read_weights(find_checkpoint(str(tmp_path))), load(Config, case(way, "torch")["config"])
    for name, weight in build_model(config).named_parameters():
        assert torch.equal(found[name], weight) != weight.requires_grad, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_0_to_3_on_two_ranks_tune_as_one_rank_does(tmp_path: Path) -> None:
    two = {way: case(way, "deepspeed", stage) for stage, way in enumerate(WAYS)}
    two["prompt in ZeRO-3"] = case("prompt", "deepspeed", 3, settings={"activation_checkpointing": "full"})
    two["lora first"] = case("lora", "deepspeed", 3, save=str(tmp_path / "lora")) | {"steps": 2}
    two["lora after"] = case("lora", "deepspeed", 3, load=str(tmp_path / "lora"))
    found = run(tmp_path, "two", 2, two)
    one = {way: run_case(case(way, "torch"), DistributedContext()) for way in WAYS}
    for way in WAYS:
        assert found[way]["losses"] == pytest.approx(one[way]["losses"], abs=1e-6), way
        assert found[way]["norms"] == pytest.approx(one[way]["norms"], rel=1e-5), way
    assert found["prompt in ZeRO-3"]["losses"] == pytest.approx(one["prompt"]["losses"], abs=1e-6)
    assert found["lora after"]["losses"] == pytest.approx(one["lora"]["losses"][2:], abs=1e-6)
