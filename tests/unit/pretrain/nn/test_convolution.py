"""`time_conv`, with its memory layouts and 16-bit workarounds, equals torch's conv1d."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.nn.convolution import ConvShape, default_route, time_conv

SHAPES = [(8, 6, 3, 2, 0, 1), (8, 8, 19, 1, 9, 4), (12, 12, 7, 1, 0, 12), (1, 6, 10, 5, 0, 1)]
"""Input channels, output channels, taps, stride, padding, groups."""


@pytest.mark.parametrize(("in_dim", "dim", "taps", "stride", "padding", "groups"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_time_conv_equals_conv1d(
    in_dim: int,
    dim: int,
    taps: int,
    stride: int,
    padding: int,
    groups: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Compares outputs and all gradients with conv1d in double precision."""
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


def test_autocast_applies_to_time_conv() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = time_conv(torch.randn(1, 20, 4), torch.randn(6, 4, 3), torch.randn(6), stride=2)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()


FEW = [
    (channels, groups, taps)
    for number, (taps, channels, groups) in enumerate(
        itertools.product((8, 32, 128), (2, 4, 6, 8, 12, 14), (1, 2, 4, 16))
    )
    if number % 3 == 0
]
"""Shapes that oneDNN computes wrongly in 16 bits on CPUs with AMX, a sample: channels per group, groups, taps."""


@pytest.mark.parametrize(("channels", "groups", "taps"), FEW)
def test_even_kernels_on_few_channels_are_padded_to_odd_ones_in_16_bits(
    channels: int, groups: int, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any CPU, no 16-bit kernel with an even number of taps runs, and outputs and gradients match fp32."""
    generator, dim = torch.Generator().manual_seed(0), channels * groups
    x_BFD = torch.randn(1, 20, dim, generator=generator).bfloat16().float().requires_grad_()
    weight_EDK = torch.randn(dim, channels, taps, generator=generator).bfloat16().float().requires_grad_()
    expected = time_conv(x_BFD, weight_EDK, None, 1, taps // 2, groups)
    wanted = torch.autograd.grad(expected.square().mean(), (x_BFD, weight_EDK))
    seen: list[int] = []
    for name in ("conv1d", "conv2d"):
        right = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, w, *rest, right=right: (seen.append(w.shape[-1]), right(x, w, *rest))[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = time_conv(x_BFD, weight_EDK, None, 1, taps // 2, groups)
    given = torch.autograd.grad(found.float().square().mean(), (x_BFD, weight_EDK))
    assert seen == [taps + 1]
    for mine, theirs in zip((found, *given), (expected, *wanted), strict=True):
        assert mine.shape == theirs.shape
        assert (mine.float() - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        (ConvShape(1, 512, 10, 5), "odd_kernel"),
        (ConvShape(12, 12, 8), "odd_kernel"),
        (ConvShape(14, 14, 16), "odd_kernel"),
        (ConvShape(16, 16, 8), "direct"),
        (ConvShape(64, 64, 8, groups=64), "direct"),
        (ConvShape(8, 8, 7), "direct"),
        (ConvShape(16, 16, 15, groups=16), "fp32"),
        (ConvShape(17, 17, 31, groups=17), "direct"),
        (ConvShape(16, 16, 14, groups=16), "direct"),
    ],
)
def test_shapes_with_a_known_fault_are_rerouted_in_16_bits_on_cpus(shape: ConvShape, route: str) -> None:
    assert default_route("cpu", torch.bfloat16, shape) == route
    assert default_route("cpu", torch.float32, shape) == "direct"
    assert default_route("cuda", torch.bfloat16, shape) == "direct"


@pytest.mark.parametrize(("channels", "taps"), [(2, 15), (16, 15), (16, 31), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_depthwise_convolutions_in_which_onednn_hangs_run_in_fp32(
    channels: int, taps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution in 16 bits would never return, so that the test forbids it instead of waiting."""
    for name in ("conv1d", "conv2d"):
        right = getattr(F, name)

        def guarded(x: Tensor, weight: Tensor, *rest: Any, right: Any = right) -> Tensor:
            assert weight.dtype == x.dtype == torch.float32
            out: Tensor = right(x, weight, *rest)
            return out

        monkeypatch.setattr(F, name, guarded)
    generator = torch.Generator().manual_seed(0)
    x_BFD = torch.randn(1, 60, channels, generator=generator).to(dtype)
    weight_EDK = torch.randn(channels, 1, taps, generator=generator).to(dtype)
    found = time_conv(x_BFD, weight_EDK, None, 1, taps // 2, channels)
    expected = time_conv(x_BFD.float(), weight_EDK.float(), None, 1, taps // 2, channels)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


def test_the_gradient_of_a_tap_that_meets_only_padding_is_zero() -> None:
    """oneDNN left it uninitialised, so that the memory it reuses is filled with NaN before."""
    generator = torch.Generator().manual_seed(0)
    x_BFD = torch.randn(2, 1, 32, generator=generator).bfloat16()
    weight_EDK = torch.randn(32, 8, 3, generator=generator).bfloat16().requires_grad_()
    out = time_conv(x_BFD, weight_EDK, None, 2, 1, 4)
    for _ in range(20):
        freed = [torch.full((size,), torch.nan) for size in (384, 768, 4096, 20_000)]
        del freed
        (found,) = torch.autograd.grad(out.sum(), weight_EDK, retain_graph=True)
        assert found[..., 1].abs().max() > 0
        assert torch.equal(found[..., ::2], torch.zeros(32, 8, 2).bfloat16())
