"""The transducer's loss against the sum over all alignments, in fp64 with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pretrain.heads.transducer import transducer_loss
from tests.support.parity_table import Parity, difference


def by_enumeration(blank_FN: Tensor, token_FN: Tensor) -> Tensor:
    """Returns −ln of the sum over all paths: N tokens are emitted at any frames, and each frame ends with a blank."""
    F, N = token_FN.shape
    paths = []
    for places in itertools.combinations_with_replacement(range(F), N):
        score = blank_FN.new_zeros(())
        for number, place in enumerate(places):
            score = score + token_FN[place, number]
        for frame in range(F):
            score = score + blank_FN[frame, sum(place <= frame for place in places)]
        paths.append(score)
    return -torch.stack(paths).logsumexp(0)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (1, 3), (4, 1), (5, 3), (3, 4), (4, 0)])
def test_the_loss_is_the_sum_over_all_paths(frames: int, tokens: int, parity: Parity) -> None:
    torch.manual_seed(frames + 10 * tokens)
    logits = torch.randn(6, 5, 7, dtype=torch.float64).log_softmax(-1)
    blank = logits[..., 0].clone().requires_grad_()
    token = logits[:, :4, 1].clone().requires_grad_()
    expected = by_enumeration(blank[:frames, : tokens + 1], token[:frames, :tokens])
    lengths = torch.tensor([frames, 6]), torch.tensor([tokens, 4])
    found = transducer_loss(torch.stack([blank, blank]), torch.stack([token, token]), *lengths)[0]
    parity("transducer loss against the sum over all paths, fp64", 1e-12, difference(found, expected))
    ours = torch.autograd.grad(found, (blank, token))
    theirs = torch.autograd.grad(expected, (blank, token), materialize_grads=True, allow_unused=True)
    worst = max(difference(one, other) for one, other in zip(ours, theirs, strict=True))
    parity("transducer loss against the sum over all paths, fp64: gradients", 1e-12, worst)


def test_a_row_without_a_frame_has_no_loss_and_finite_gradients() -> None:
    blank, token = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 3, 1, requires_grad=True)
    loss = transducer_loss(blank, token, torch.tensor([0]), torch.tensor([1]))
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert blank.grad is not None
    assert bool(blank.grad.eq(0).all())


def test_unlikely_tokens_lose_no_precision() -> None:
    """Sums over many frames of small probabilities stay exact in fp32."""
    torch.manual_seed(1)
    logits = (4 * torch.randn(200, 41, 29, dtype=torch.float64)).log_softmax(-1)
    blank, token = logits[None, :, :, 0], logits[None, :, :40, 1]
    sizes = torch.tensor([200]), torch.tensor([40])
    exact = transducer_loss(blank, token, *sizes)
    torch.testing.assert_close(transducer_loss(blank.float(), token.float(), *sizes).double(), exact, rtol=1e-5, atol=0)
