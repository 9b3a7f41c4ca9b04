"""Kernels of CPUs with AMX: products are right, the known fault is seen, and `time_conv` avoids it.

On other CPUs, `make test-amx` runs these tests with emulated instructions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pretrain.nn.convolution import time_conv

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX, or `make test-amx`, which emulates one"
)


def operands(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 96, 80), (17, 33, 5), (1, 768, 31), (200, 2, 100)])
def test_products_are_right_to_rounding(
    rows: int, inner: int, columns: int, dtype: torch.dtype, rounding: float
) -> None:
    """Each element differs from the product in double precision by the rounding of result, sum and subnormals."""
    a, b = (value.to(dtype) for value in operands((rows, inner), (inner, columns)))
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((a @ b).double() - exact).abs().le(rounding * exact.abs() + 1e-6 * size + 2**-25).all()


@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 96, 80), (33, 64, 16), (20, 8, 200)])
def test_products_of_integers_are_exact(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)
        for size in ((rows, inner), (inner, columns))
    )
    assert torch.equal(torch._int_mm(a, b), (a.long() @ b.long()).int())


SHAPES = list(itertools.product((8, 32, 128), (2, 6, 14), (1, 4)))
"""Taps, channels per group and groups of positional convolutions."""


def errors(taps: int, channels: int, groups: int) -> tuple[float, float]:
    """Returns the relative errors of conv1d and `time_conv` in bf16."""
    dim = channels * groups
    x_BFD, weight_EDK = (value.bfloat16().float() for value in operands((2, 50, dim), (dim, channels, taps)))
    exact = F.conv1d(x_BFD.mT, weight_EDK, None, 1, taps // 2, 1, groups).mT
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv1d(x_BFD.mT, weight_EDK, None, 1, taps // 2, 1, groups).mT
        found = time_conv(x_BFD, weight_EDK, None, 1, taps // 2, groups)
    return tuple(float((value.float() - exact).norm() / exact.norm()) for value in (plain, found))  # type: ignore[return-value]


def test_time_conv_is_right_where_conv1d_is_not() -> None:
    """conv1d is wrong for exactly the shapes that pretrain/nn/convolution.py names. If none is, its rule can go."""
    found = {shape: errors(*shape) for shape in SHAPES}
    assert max(mine for _, mine in found.values()) < 0.01
    for (taps, channels, _), (plain, _) in found.items():
        assert (plain > 0.9) == (channels * taps > 32 and channels * taps % 32 == 0), found


@pytest.mark.parametrize("taps", [3, 31, 127])
def test_odd_kernels_are_right(taps: int) -> None:
    assert max(errors(taps, channels, groups)[0] for channels in (2, 6, 14) for groups in (1, 4)) < 0.01
