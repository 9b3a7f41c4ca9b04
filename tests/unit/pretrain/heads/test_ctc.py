"""The CTC head: its loss against the sum over all paths, the rows that it can use, and the frames a text needs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.heads import ctc
from pretrain.heads.ctc import frames_needed
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape
from pretrain.interfaces.objectives import Head, HeadPlan
from tests.support.contract_cases import make
from tests.support.parity_table import Parity, difference

SHAPE = ModelShape(dim=8, n_layers=1, feature_dim=80, feature_rate_hz=100.0, rate_hz=25.0)
CTX = StepContext(seed=0, step=0)
FRAMES = 4


def head() -> ctc.CTC:
    torch.manual_seed(0)
    return ctc.build(load(ctc.Config, {"symbols": "ab"}), SHAPE)


def batch(*texts: str) -> Batch:
    rows = len(texts)
    keys = tuple(f"k{row}" for row in range(rows))
    return Batch(torch.zeros(rows, 2_560), torch.full((rows,), 2_560), keys, 0, labels={"text": texts})


def encoded(rows: int) -> EncoderOutput:
    layer_BFD = torch.randn(rows, FRAMES, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    return EncoderOutput((layer_BFD, layer_BFD), torch.full((rows,), FRAMES), 25.0)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def summed_over_paths(log_probs_FV: Tensor, target: tuple[int, ...]) -> Tensor:
    paths = [path for path in itertools.product(range(3), repeat=FRAMES) if collapsed(path) == target]
    return torch.stack([log_probs_FV[range(FRAMES), path].sum() for path in paths]).logsumexp(0)


def test_the_loss_is_that_of_all_paths_of_the_usable_rows() -> None:
    made, out = head(), encoded(4)
    found = made(out, batch("ab", "aa", "abab", "b"), HeadPlan(torch.tensor(0.0), torch.tensor([1, 1, 0, 1]) > 0), CTX)
    log_probs_BFV = made.log_probs(out)
    targets = {0: (1, 2), 1: (1, 1), 3: (2,)}
    expected = -sum(summed_over_paths(log_probs_BFV[row], target) for row, target in targets.items())
    torch.testing.assert_close(found.total, expected)
    assert int(found.count) == 2 + 2 + 1
    assert tuple(map(float, found.metrics[made.monitoring().infeasible or ""])) == (1.0, 4.0)


def test_the_loss_in_fp64_is_the_sum_over_all_paths(parity: Parity) -> None:
    """Loss and gradients of the layer, for texts with and without a repeated symbol."""
    made = head().double()
    layer_BFD = torch.randn(3, FRAMES, SHAPE.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = EncoderOutput((layer_BFD, layer_BFD), torch.full((3,), FRAMES), 25.0)
    found = made(out, batch("ab", "aa", "bab"), HeadPlan(torch.tensor(0.0), torch.ones(3, dtype=torch.bool)), CTX).total
    log_probs_BFV = made.log_probs(out)
    paths = [summed_over_paths(log_probs_BFV[row], text) for row, text in enumerate([(1, 2), (1, 1), (2, 1, 2)])]
    expected = -torch.stack(paths).sum()
    assert found.dtype == torch.float64
    parity("CTC loss against the sum over all paths, fp64", 1e-12, difference(found, expected))
    gradients = (torch.autograd.grad(loss, list(made.parameters())) for loss in (found, expected))
    worst = max(difference(one, other) for one, other in zip(*gradients, strict=True))
    parity("CTC loss against the sum over all paths, fp64: gradients", 1e-12, worst)


@pytest.mark.parametrize("target", [(), (1,), (1, 2), (1, 1), (2, 2, 2), (1, 2, 2, 1)])
def test_a_text_needs_a_blank_between_equal_symbols(target: tuple[int, ...]) -> None:
    def spelled_on(frames: int) -> bool:
        return any(collapsed(path) == target for path in itertools.product(range(3), repeat=frames))

    assert frames_needed(target) == next(frames for frames in range(9) if spelled_on(frames))


def test_rows_without_text_or_with_too_few_frames_are_no_targets() -> None:
    module = make("none", heads={"task": {"name": "ctc", "symbols": "ab"}})
    task = module.heads["task"]
    assert isinstance(task, Head)
    frames = int(module.model.frontend.frame_lengths(torch.tensor([2_560])))
    plan = task.prepare(module.model, batch("ab", "", "xyz", (frames + 1) * "a"), CTX)
    assert plan.rows_B.tolist() == [True, False, False, False]
    assert int(plan.count) == 2
