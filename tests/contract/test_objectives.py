"""What every objective must satisfy, on every front end and encoder. New ones are found by themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule
from tests.support.contract_cases import CASES, ENCODERS, FRONTENDS, batch, make
from tests.support.parity_table import Parity, difference

EVERY = pytest.mark.parametrize(
    ("objective", "frontend", "encoder"), [(o, f, e) for o in CASES for f in FRONTENDS for e in ENCODERS]
)
CTX = StepContext(seed=3, step=5)


def couples(module: TrainModule) -> frozenset[str]:
    return module.objective.couples | module.model.frontend.couples | module.model.encoder.couples


def run(
    module: TrainModule, batch: Batch, ctx: StepContext = CTX, global_counts: Tensor | None = None
) -> tuple[Tensor, dict[str, Sum]]:
    torch.manual_seed(17)
    plan = module.prepare(batch, ctx)
    out: tuple[Tensor, dict[str, Sum]] = module(
        batch, plan, plan.counts_K if global_counts is None else global_counts, ctx
    )
    return out


def train(module: TrainModule, batch: Batch, steps: int, lr: float = 5e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr)
    losses = []
    for step in range(steps):
        ctx = StepContext(3, step)
        loss, _ = run(module, batch, ctx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(ctx)
        losses.append(float(loss.detach()))
    return losses


@EVERY
def test_padding_never_changes_the_loss(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder).eval()
    if "padding" in couples(module):
        pytest.skip("declared: padding takes part")
    tight, metrics = run(module, batch((1.0, 0.7)))
    loose, loose_metrics = run(module, batch((1.0, 0.7), width=1.5))
    torch.testing.assert_close(loose, tight, rtol=2e-5, atol=1e-6)
    assert loose_metrics["loss/objective"][1] == metrics["loss/objective"][1]


@EVERY
def test_the_loss_is_the_sum_of_its_parts(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder).eval()
    if "batch" in couples(module) or "padding" in couples(module):
        pytest.skip("declared: samples are coupled")
    whole, metrics = run(module, batch((1.0, 0.7)))
    counts = module.prepare(batch((1.0, 0.7)), CTX).counts_K
    first, _ = run(module, batch((1.0,)), global_counts=counts)
    second, _ = run(module, batch((0.7,), first_seed=1), global_counts=counts)
    torch.testing.assert_close(first + second, whole, rtol=2e-5, atol=1e-6)
    total, count = metrics["loss/objective"]
    torch.testing.assert_close(total / count, whole.double(), rtol=1e-6, atol=0, check_dtype=False)


@EVERY
def test_same_context_same_bits(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    first, metrics = run(module, batch())
    run(module, batch((1.2,), first_seed=7), StepContext(3, 9))  # what ran before must not matter
    second, again = run(module, batch())
    assert torch.equal(first, second)
    assert metrics.keys() == again.keys()
    assert all(torch.equal(metrics[name][0], again[name][0]) for name in metrics)
    other, _ = run(module, batch(), StepContext(3, 6))
    assert not torch.equal(first, other), "the mask ignores the step"


@EVERY
def test_gradients_reach_every_weight(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    run(module, batch())[0].backward()
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        assert weight.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(weight.grad).all(), f"{name} has a gradient that is not finite"
        assert weight.grad.abs().max() > 0, f"{name} has a gradient of 0"


@EVERY
def test_one_batch_can_be_overfitted(objective: str, frontend: str, encoder: str) -> None:
    losses = train(make(objective, frontend, encoder), batch(), steps=40)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), f"{losses[0]:.3f} became only {losses[-1]:.3f}"


@EVERY
def test_bf16(objective: str, frontend: str, encoder: str) -> None:
    exact, _ = run(make(objective, frontend, encoder).eval(), batch())
    module = make(objective, frontend, encoder, precision="bf16").eval()
    rounded, _ = run(module, batch())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    rounded.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters() if weight.grad is not None)


@EVERY
def test_state_round_trip(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    train(module, batch(), steps=2)
    fresh = make(objective, frontend, encoder, seed=9)
    assert not torch.equal(run(fresh, batch())[0], run(module, batch())[0])
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(run(fresh, batch())[0], run(module, batch())[0])


@pytest.mark.parametrize("objective", CASES)
def test_weights_depend_on_the_seed_alone(objective: str) -> None:
    torch.manual_seed(0)
    first: dict[str, Any] = make(objective).state_dict()
    torch.manual_seed(1)
    second = make(objective).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@EVERY
def test_activation_checkpointing_changes_no_gradient(
    objective: str, frontend: str, encoder: str, parity: Parity
) -> None:
    plain, checkpointed = make(objective, frontend, encoder), make(objective, frontend, encoder)
    checkpointed.model.encoder.activation_checkpointing = "full"
    for module in (plain, checkpointed):
        run(module, batch())[0].backward()
    for one, two in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            assert two.grad is not None
            parity("checkpointed = plain: gradients of every objective", 1e-6, difference(two.grad, one.grad))
