"""Balance of multitask losses against a twin in NumPy; gradients of tasks against autograd; resume with equal bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.configs import BalanceConfig
from pretrain.interfaces.frames import StepContext
from pretrain.nn.balance import TASK_GRADIENTS, Balance
from pretrain.train_module import build_model
from tests.support.contract_cases import CASES, FRONTENDS, batch, labelled, small

ADAPTIVE = ("uncertainty", "dwa", "gradnorm")


def run_of(seed: int, updates: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns sums, counts and squared gradients of three tasks; the last one has no target at first."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, (updates, 3)).astype(float)
    counts[:7, 2] = 0
    counts[rng.random((updates, 3)) < 0.2] = 0
    losses = counts * np.array([5.0, 2.0, 0.3]) * np.exp(-0.05 * np.arange(updates))[:, None]
    squares = np.where(counts > 0, rng.uniform(0.1, 4, (updates, 3)), 0)
    return losses * rng.uniform(0.8, 1.2, (updates, 3)), counts, squares


def twin(config: BalanceConfig, losses: np.ndarray, counts: np.ndarray, squares: np.ndarray) -> np.ndarray:
    factors, means, first, history = np.ones(3), [None] * 3, [None] * 3, []
    for loss, count, square in zip(losses, counts, squares, strict=True):
        for k in range(3):
            if count[k]:
                new = loss[k] / count[k]
                first[k] = new if means[k] is None else first[k]
                means[k] = new if means[k] is None else config.smoothing * means[k] + (1 - config.smoothing) * new
        seen = [k for k in range(3) if means[k] is not None]
        if config.name == "uncertainty":
            for k in seen:
                factors[k] = 1 / means[k]
        elif config.name == "dwa":
            old = history[-config.window] if len(history) >= config.window else [None] * 3
            history.append(list(means))
            rates = [1.0 if old[k] is None else means[k] / old[k] for k in seen]
            powers = np.exp(np.array(rates) / config.temperature)
            factors[seen] = len(seen) * powers / powers.sum()
        else:
            active = [k for k in seen if square[k] > 0]
            if len(active) < 2:
                continue
            norms = np.sqrt(square[active])
            rates = np.array([means[k] / first[k] for k in active])
            target = norms.mean() * (rates / rates.mean()) ** config.asymmetry
            moved = np.clip(factors[active] * (target / norms) ** config.rate, 1 / config.largest, config.largest)
            factors[active] = moved / moved.mean()
    return factors


@pytest.mark.parametrize("name", ADAPTIVE)
def test_factors_equal_those_of_a_twin_in_numpy(name: Any) -> None:
    config = BalanceConfig(name=name, window=8, smoothing=0.9)
    balance = Balance(config, [False] * 3)
    given = run_of(1)
    for row in zip(*given, strict=True):
        balance.update(*map(torch.from_numpy, row))
    np.testing.assert_allclose(balance.factors_K.numpy(), twin(config, *given), rtol=1e-12)


def test_uncertainty_gives_every_task_the_same_weighted_loss() -> None:
    balance = Balance(BalanceConfig(name="uncertainty"), [False, False])
    balance.update(torch.tensor([80.0, 3.0]), torch.tensor([10.0, 30.0]), torch.zeros(2))
    torch.testing.assert_close(balance.factors_K * torch.tensor([8.0, 0.1]).double(), torch.ones(2).double())


def test_fixed_factors_have_no_state() -> None:
    assert Balance(BalanceConfig(), [False, False]).state_dict() == {}


def values(**balance: Any) -> dict[str, Any]:
    return {
        "data": {"shards": "none", "micro_batches": 2, "labels": ["text", "speaker"]},
        "objective": small("objectives", "best_rq"),
        "heads": {
            "text": {"name": "ctc", "weight": 0.5},
            "who": {"name": "classifier", "classes": ["ann", "bob"], "embedding_dim": 16, "warmup": [1, 3]},
            "mel": {"name": "reconstruction", "input": "whole"},
        },
        "frontend": FRONTENDS["log_mel"],
        "encoder": small("encoders", "transformer"),
        "engine": {"name": "torch"},
        "balance": balance,
    }


def engine(**balance: Any) -> Engine:
    config = load(Config, values(**balance))
    return make_engine(config, build_model(config), DistributedContext(0, 1, 0, "cpu"))


def batches(step: int) -> list[Batch]:
    made = [labelled(batch(first_seed=20 * step + 2 * number)) for number in range(2)]
    return [dataclasses.replace(one, micro_batch=number) for number, one in enumerate(made)]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_resumed_run_continues_with_the_same_bits(name: str) -> None:
    straight, first, second = (engine(name=name, window=2) for _ in range(3))
    steps = [(batches(step), StepContext(0, step), 1e-3) for step in range(5)]
    for step in steps:
        straight.step(*step)
    for step in steps[:3]:
        first.step(*step)
    second.load_tensors({key: tensor.clone() for key, tensor in first.tensors()}, 3)
    for step in steps[3:]:
        second.step(*step)
    expected = dict(straight.tensors())
    assert "model/balance.factors_K" in expected
    assert not torch.equal(expected["model/balance.factors_K"], torch.ones(4, dtype=torch.float64))
    for key, tensor in second.tensors():
        assert torch.equal(tensor, expected[key]), key


def test_gradients_of_tasks_are_those_that_autograd_finds_alone() -> None:
    running = engine(measure=True)
    module, data, ctx = running.module.eval(), batches(0)[0], StepContext(0, 5)
    outputs: list[torch.Tensor] = []
    module.model.encoder.register_forward_hook(lambda _, given, out: outputs.append(out.layers[-1]))
    plan = module.prepare(data, ctx)
    loss, metrics = module(data, plan, plan.counts_K, ctx)
    loss.backward()
    measured_K = metrics[TASK_GRADIENTS][0].numpy()
    for number in range(len(module.tasks)):
        outputs.clear()
        alone = plan.counts_K.clone()
        alone[[k for k in range(4) if k != number]] = 0
        part, _ = module(data, plan, alone, ctx)
        grads = torch.autograd.grad(part, outputs, allow_unused=True)
        expected = sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
        assert measured_K[number] == pytest.approx(expected, rel=1e-4)
        assert expected > 0
    shares = module.gradient_shares({TASK_GRADIENTS: (measured_K, 1.0)})
    assert shares["objective"] == pytest.approx(measured_K[0] ** 0.5 / (measured_K**0.5).sum())
    assert list(shares) == list(module.tasks)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_balance_of_a_single_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="two losses"):
        load(Config, values(name="dwa") | {"heads": {}})


@pytest.mark.parametrize("objective", ["data2vec2", "time_contrastive"])
@pytest.mark.parametrize(
    ("balance", "said"),
    [
        ({"name": "gradnorm"}, r'balance\.name="gradnorm": .*heads\.text'),
        ({"measure": True}, r"balance\.measure=true: .*heads\.text"),
    ],
)
def test_gradients_that_cannot_be_separated_are_refused_before_the_run(
    objective: str, balance: dict[str, Any], said: str
) -> None:
    """The encoder computes other rows or frames than those that heads get."""
    described = values(**balance) | {"objective": CASES[objective]}
    described["heads"] = {"text": {"name": "ctc", "input": "objective"}}
    with pytest.raises(ConfigError, match=said + r".*set heads\.text\.input=whole"):
        load(Config, described)
    load(Config, described | {"balance": {"name": "uncertainty"}})
    described["heads"]["text"]["input"] = "whole"
    running = make_engine(config := load(Config, described), build_model(config), DistributedContext(0, 1, 0, "cpu"))
    assert running.step(batches(0), StepContext(0, 0), 1e-3).loss > 0
