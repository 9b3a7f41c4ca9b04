"""State that an objective collects for `after_step` comes from its own update only, not from skipped attempts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.frames import StepContext
from pretrain.objectives.dinosr import DinoSR
from pretrain.self_supervision.masked_prediction import MaskedUnits
from pretrain.train_module import build_model
from tests.support.contract_cases import FRONTENDS, RELABELLED, small
from tests.support.contract_cases import batch as contract_batch

WORLD = DistributedContext(0, 1, 0, "cpu")
SKIP = 0.0


def engine(objective: dict[str, Any], precision: str = "fp32") -> Engine:
    values = {
        "data": {"shards": "none", "micro_batches": 2},
        "objective": objective,
        "frontend": FRONTENDS["log_mel"],
        "encoder": small("encoders", "transformer"),
        "engine": {"name": "torch", "precision": precision},
    }
    config = load(Config, values)
    return make_engine(config, build_model(config), WORLD)


def batches(step: int) -> list[Batch]:
    made = [contract_batch(first_seed=20 * step + 2 * number) for number in range(2)]
    return [Batch(b.wave_BT, b.lengths_B, b.keys, number) for number, b in enumerate(made)]


def update(running: Engine, step: int, skip_above: float = math.inf, broken: bool = False) -> None:
    given = batches(step)
    if broken:
        given[1].wave_BT[0, 5000] = math.nan
    running.step(given, StepContext(0, step), 1e-4, skip_above=skip_above)


def codes(running: Engine) -> tuple[Tensor, Tensor]:
    objective = running.module.objective
    assert isinstance(objective, DinoSR)
    return objective.sums_LVD, objective.sizes_LV


def units(running: Engine) -> MaskedUnits:
    objective = running.module.objective
    assert isinstance(objective, MaskedUnits)
    return objective


def test_an_update_that_overflows_counts_its_frames_once() -> None:
    calm, hot = (engine(small("objectives", "dinosr"), "fp16") for _ in range(2))
    calm.scale.value, hot.scale.value = 1.0, 2.0**40
    for running in (calm, hot):
        update(running, 0)
    assert 1.0 < hot.scale.value < 2.0**40, "no update overflowed"
    for mine, other in zip(codes(hot), codes(calm), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("lost", ["left out", "broken"])
def test_a_skipped_update_leaves_no_frames_to_the_next_update(lost: str) -> None:
    straight, other = (engine(small("objectives", "dinosr")) for _ in range(2))
    if lost == "left out":
        update(other, 0, SKIP)
    else:
        with pytest.raises(FloatingPointError):
            update(other, 0, broken=True)
    for running in (straight, other):
        update(running, 1)
    for mine, expected in zip(codes(other), codes(straight), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_skipped_relabelling_is_done_at_the_next_update(resumed: bool) -> None:
    running = engine(RELABELLED)
    update(running, 0)
    update(running, 1, SKIP)
    assert not units(running).relabelled
    if resumed:
        saved = {name: tensor.clone() for name, tensor in running.tensors()}
        running = engine(RELABELLED)
        running.load_tensors(saved, 2)
    centres = units(running).layer_centres_KD.clone()
    teacher = next(units(running).teacher.parameters()).clone()  # type: ignore[union-attr]
    update(running, 2)
    assert units(running).relabelled
    assert units(running).active_units() == RELABELLED["relabel_units"] != RELABELLED["units"]
    assert not torch.equal(units(running).layer_centres_KD, centres)
    assert not torch.equal(next(units(running).teacher.parameters()), teacher)  # type: ignore[union-attr]
    fitted = units(running).layer_centres_KD.clone()
    update(running, 3)
    assert torch.equal(units(running).layer_centres_KD, fitted)


@pytest.mark.parametrize(
    ("name", "options", "book"),
    [
        ("hubert", {}, "centres_KD"),
        ("efficient", {}, "quantizer.projection_DC"),
        ("best_rq", {"projection": "pca"}, "quantizers.0.projection_DC"),
        ("time_contrastive", {"clusters": 8}, "centres_KD"),
    ],
)
def test_targets_are_fitted_on_the_first_update_that_is_not_skipped(
    name: str, options: dict[str, Any], book: str
) -> None:
    running = engine(small("objectives", name, **options))
    objective = running.module.objective
    first = objective.state_dict()[book].clone()
    update(running, 0, SKIP)
    assert torch.equal(objective.state_dict()[book], first)
    update(running, 1)
    fitted = objective.state_dict()[book].clone()
    assert not torch.equal(fitted, first)
    update(running, 2)
    assert torch.equal(objective.state_dict()[book], fitted)
