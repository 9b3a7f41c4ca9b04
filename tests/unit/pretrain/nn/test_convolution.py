"""The layout of a convolution's memory changes its speed, not its result."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.nn.convolution import time_conv

SHAPES = [(8, 6, 3, 2, 0, 1), (8, 8, 19, 1, 9, 4), (12, 12, 7, 1, 0, 12), (1, 6, 10, 5, 0, 1)]
"""In, out, taps, stride, padding, groups."""


@pytest.mark.parametrize(("in_dim", "dim", "taps", "stride", "padding", "groups"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_time_conv_is_conv1d(
    in_dim: int,
    dim: int,
    taps: int,
    stride: int,
    padding: int,
    groups: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Against conv1d in double precision, with all gradients."""
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 40, in_dim), (dim, in_dim // groups, taps), (dim,))
    ]
    expected = F.conv1d(exact[0].transpose(1, 2), exact[1], exact[2], stride, padding, 1, groups).transpose(1, 2)
    expected.square().mean().backward()
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    found = time_conv(*given, stride, padding, groups)
    found.square().mean().backward()
    assert found.dtype == dtype
    pairs = [(found, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(given, exact, strict=True))]
    for mine, theirs in pairs:
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_autocast_reaches_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = time_conv(torch.randn(1, 20, 4), torch.randn(6, 4, 3), torch.randn(6), stride=2)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
