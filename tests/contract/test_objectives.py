"""Contract of every objective, on every front end and encoder; new objectives are tested automatically."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.monitoring import CODE_COUNTS
from pretrain.interfaces.objectives import Sum
from pretrain.monitoring.observation import chance_accuracy
from pretrain.train_module import TrainModule
from tests.support.contract_cases import CASES, ENCODERS, FRONTENDS, batch, make
from tests.support.parity_table import Parity, difference

EVERY = pytest.mark.parametrize(
    ("objective", "frontend", "encoder"), [(o, f, e) for o in CASES for f in FRONTENDS for e in ENCODERS]
)
PAIRS = tuple(zip(FRONTENDS, ENCODERS, strict=True))
"""Pairs that cover every front end and every encoder."""
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
        pytest.skip("declared: the loss depends on padding")
    tight, metrics = run(module, batch((1.0, 0.7)))
    loose, loose_metrics = run(module, batch((1.0, 0.7), width=1.5))
    torch.testing.assert_close(loose, tight, rtol=2e-5, atol=1e-6)
    assert loose_metrics["loss/objective"][1] == metrics["loss/objective"][1]


@EVERY
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(objective: str, frontend: str, encoder: str) -> None:
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
def test_equal_step_contexts_give_equal_bits(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    first, metrics = run(module, batch())
    run(module, batch((1.2,), first_seed=7), StepContext(3, 9))  # earlier calls must not change the result
    second, again = run(module, batch())
    assert torch.equal(first, second)
    assert metrics.keys() == again.keys()
    assert all(torch.equal(metrics[name][0], again[name][0]) for name in metrics)
    other, _ = run(module, batch(), StepContext(3, 6))
    assert not torch.equal(first, other), "the mask does not depend on the step"


@EVERY
def test_gradients_reach_every_weight(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    run(module, batch())[0].backward()
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        assert weight.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(weight.grad).all(), f"the gradient of {name} is not finite"
        assert weight.grad.abs().max() > 0, f"the gradient of {name} is 0"


@pytest.mark.parametrize(("objective", "frontend", "encoder"), [(o, f, e) for o in CASES for f, e in PAIRS])
def test_a_single_batch_can_be_overfitted(objective: str, frontend: str, encoder: str) -> None:
    losses = train(make(objective, frontend, encoder), batch(), steps=40)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), f"{losses[0]:.3f} only fell to {losses[-1]:.3f}"


@EVERY
def test_the_loss_in_bf16_is_close_to_that_in_fp32(objective: str, frontend: str, encoder: str) -> None:
    exact, _ = run(make(objective, frontend, encoder).eval(), batch())
    module = make(objective, frontend, encoder, precision="bf16").eval()
    rounded, _ = run(module, batch())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    rounded.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters() if weight.grad is not None)


@EVERY
def test_a_loaded_state_gives_the_same_loss(objective: str, frontend: str, encoder: str) -> None:
    module = make(objective, frontend, encoder)
    train(module, batch(), steps=2)
    fresh = make(objective, frontend, encoder, seed=9)
    assert not torch.equal(run(fresh, batch())[0], run(module, batch())[0])
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(run(fresh, batch())[0], run(module, batch())[0])


@pytest.mark.parametrize("objective", CASES)
def test_initial_weights_depend_on_the_seed_only(objective: str) -> None:
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


FRONT = pytest.mark.parametrize(("objective", "frontend"), [(o, f) for o in CASES for f in FRONTENDS])
LAID_OUT = pytest.mark.parametrize(
    ("objective", "frontend", "packed"),
    [(o, f, False) for o in CASES for f in FRONTENDS] + [(o, "waveform_conv", True) for o in CASES],
)
"""Padded rows, and packed rows with the front end whose convolutions have no padding."""


def beside(good: Batch, *samples: int) -> Batch:
    """Returns the utterances of `good` followed by clips of noise with the given numbers of samples."""
    rows = len(good.keys) + len(samples)
    wave_BT = torch.zeros(rows, max(good.wave_BT.shape[1], *samples))
    wave_BT[: len(good.keys), : good.wave_BT.shape[1]] = good.wave_BT
    for row, length in enumerate(samples, len(good.keys)):
        wave_BT[row, :length] = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(row))
    lengths_B = torch.cat([good.lengths_B, torch.tensor(samples)])
    return Batch(wave_BT, lengths_B, (*good.keys, *(f"short-{length}" for length in samples)), 0)


def short_lengths(module: TrainModule) -> tuple[int, int, int]:
    """Returns 1, the largest number of samples without a frame, and the smallest number with one frame."""
    one = module.model.frontend.least_samples()
    return 1, one - 1, one


@LAID_OUT
def test_utterances_with_no_or_one_frame_do_not_change_other_utterances(
    objective: str, frontend: str, packed: bool
) -> None:
    module = make(objective, frontend).eval()
    module.model.frontend.packed = module.model.encoder.packed = packed
    good = batch((1.0,))
    alone, metrics = run(module, good)
    together, joined = run(module, beside(good, *short_lengths(module)))
    assert torch.isfinite(together)
    if "batch" not in module.objective.couples:
        torch.testing.assert_close(together, alone, rtol=2e-5, atol=1e-6)
    assert joined["loss/objective"][1] == metrics["loss/objective"][1], "utterances without frames have no targets"
    together.backward()
    assert all(torch.isfinite(w.grad).all() for w in module.parameters() if w.grad is not None)


@LAID_OUT
def test_a_micro_batch_without_targets_has_zero_loss_and_gradients(objective: str, frontend: str, packed: bool) -> None:
    module = make(objective, frontend)
    module.model.frontend.packed = module.model.encoder.packed = packed
    nothing = Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), (), 0)
    for without in (beside(nothing, 1), beside(nothing, *short_lengths(module)[1:]), batch().emptied(9)):
        module.forget()
        loss, metrics = run(module, without)
        assert float(loss.detach()) == 0.0
        assert float(metrics["loss/objective"][1]) == 0.0
        loss.backward()
        module.after_step(CTX)
    assert all(float(w.grad.abs().max()) == 0.0 for w in module.parameters() if w.grad is not None)
    assert [name for name, tensor in module.state_dict().items() if not torch.isfinite(tensor).all()] == []
    assert torch.isfinite(run(module, batch())[0]), "the next update is not affected"


@FRONT
def test_the_shortest_usable_utterance_has_a_target(objective: str, frontend: str) -> None:
    module = make(objective, frontend).eval()
    least = module.least_samples
    counts = [
        float(module.prepare(beside(batch((1.0,)), least), StepContext(3, step)).counts_K[0])
        - float(module.prepare(batch((1.0,)), StepContext(3, step)).counts_K[0])
        for step in range(3)
    ]
    assert min(counts) > 0


@FRONT
def test_at_least_one_frame_of_every_utterance_stays_visible(objective: str, frontend: str) -> None:
    """The utterances have 2 to 12 frames, which spans and blocks could cover completely."""
    module = make(objective, frontend, **({"mask_span": 10} if "mask_span" in CASES[objective] else {})).eval()
    least = module.model.frontend.least_samples
    data = beside(batch((1.0,)), *(least(frames) for frames in range(2, 13)))
    for step in range(2):
        module.objective.record_next()
        run(module, data, StepContext(3, step))
        last = module.objective.monitoring().last
        assert last is not None
        visible_B = module.model.frontend.frame_lengths(data.lengths_B) - last.mask_BF.sum(1)
        assert int(visible_B.min()) >= 1


@FRONT
def test_the_monitoring_record_is_complete(objective: str, frontend: str) -> None:
    module = make(objective, frontend)
    module.objective.record_next()
    data = batch()
    _, metrics = run(module, data)
    record = module.objective.monitoring()
    deviations = [record.target_deviation, record.prediction_deviation]
    named = [record.loss, record.accuracy, record.chance_loss, record.chance_accuracy, *deviations]
    assert all(name in metrics for name in named if name is not None)
    assert float(metrics[record.loss][1]) > 0
    for book in record.books:
        counts = metrics[book.metric][0]
        assert 0 <= book.first < book.first + book.size <= len(counts)
    books = {book.metric for book in record.books}
    assert books == record.count_metrics == {name for name, (total, _) in metrics.items() if total.numel() > 1}
    assert all(name.startswith(CODE_COUNTS) for name in books)
    assert len({book.title for book in record.books}) == len(record.books)
    if record.accuracy is not None:
        assert 0.0 < chance_accuracy(record, {k: (t.numpy(), float(n)) for k, (t, n) in metrics.items()}) < 1.0
    last = record.last
    assert last is not None
    n = int(last.mask_BF.sum())
    assert len(last.mask_BF) == len(data.keys)
    assert last.mask_BF.shape[1] >= int(module.model.frontend.frame_lengths(torch.tensor([16_000])))
    assert n > 0
    vectors = [last.targets_ND, last.predictions_ND]
    units = [last.target_units_N, last.predicted_units_N]
    assert (vectors[0] is None) == (vectors[1] is None)
    assert (units[0] is None) == (units[1] is None)
    assert vectors[0] is not None or units[0] is not None, "targets and predictions"
    assert all(len(part) == n and not part.requires_grad for part in (*vectors, *units) if part is not None)
    assert vectors[0] is None or (vectors[1] is not None and vectors[0].shape == vectors[1].shape)
    for vectors_ND, name in zip(vectors, deviations, strict=True):
        assert (vectors_ND is None) == (name is None), "the detectors of a collapse read the deviation of vectors"
        assert name is None or float(metrics[name][0] / metrics[name][1]) > 0
    assert all(part.dtype == torch.int64 for part in units if part is not None)
    assert record.target_version == 0
    module.objective.record_next()
    assert module.objective.monitoring().last is None, "nothing is recorded before the next forward pass"
