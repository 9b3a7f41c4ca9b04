"""Contract of adaptation to episodes: every head and objective in the inner loop; new ones are tested automatically."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.engine_configs import MetaConfig
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Head, Objective
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import CASES, HEADS
from tests.support.episodes import episode, settings

TASKS: list[tuple[str, str | None]] = [*(("none", head) for head in HEADS), *((name, None) for name in CASES)]
METHODS = get_args(get_type_hints(MetaConfig)["method"])


class Update(NamedTuple):
    """One update.  moved: names of the weights that it changed.  figures: means of the engine's metrics."""

    moved: set[str]
    figures: dict[str, float]
    grad_norm: float


def updated(objective: str, head: str | None, **meta: Any) -> Update:
    config = settings(objective, head, **meta)
    module = build_model(config)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    engine = make_engine(config, module, DistributedContext())
    result = engine.step([episode(0), episode(1)], StepContext(0, 0), 1e-3)
    after = dict(module.named_parameters())
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    figures = {name: float(total[0]) / n for name, (total, n) in result.metrics.items() if name.startswith("meta/")}
    return Update(moved, figures, result.grad_norm)


def gathers(objective: str, head: str | None) -> bool:
    module: TrainModule = build_model(settings(objective, head, method="fomaml"))
    return any(part.gathers for part in module.modules() if isinstance(part, Objective | Head))


@pytest.mark.parametrize(("objective", "head"), TASKS)
def test_an_update_through_inner_steps_reaches_start_and_rates_or_is_refused(objective: str, head: str | None) -> None:
    if gathers(objective, head):
        with pytest.raises(ConfigError, match="of all ranks, which an episode must not depend on"):
            updated(objective, head, method="maml")
        return
    method = "maml"
    if head is not None and not settings("none", head, method="fomaml").heads["task"].twice_differentiable:
        with pytest.raises(ConfigError, match=r"engine\.meta\.method.*has no second derivative"):
            settings(objective, head, method="maml")
        method = "fomaml"
    found = updated(objective, head, method=method, inner_lr=1e-3, learn_lr=True)
    assert math.isfinite(found.grad_norm)
    assert any(name.startswith("model.encoder.blocks.0.") for name in found.moved)
    assert any(name.startswith("inner_rates.") for name in found.moved)
    assert found.figures["meta/support_loss_after"] < found.figures["meta/support_loss_before"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_to_the_support_and_moves_the_start(method: str) -> None:
    found = updated("none", "classifier", method=method, inner_lr=1e-3)
    assert found.figures["meta/support_loss_after"] < found.figures["meta/support_loss_before"]
    assert any(name.startswith("heads.") for name in found.moved)
    assert not any(name.startswith("inner_rates.") for name in found.moved)
