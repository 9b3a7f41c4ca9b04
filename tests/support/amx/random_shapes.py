"""Random 16-bit operations against fp32: `python -m tests.support.amx -- -m tests.support.amx.random_shapes 0 60`.

The numbers are a seed and seconds of processor time. Prints each operation whose output or gradient differs from fp32
by more than LIMIT of its size. An operation that hangs is the last line of the file `--log`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.nn.convolution import time_conv

LIMIT = 0.03
FP16_PRODUCTS = 200_000
"""Larger fp16 convolutions take minutes where conversions are emulated."""
Case = tuple[str, list[Tensor], Callable[..., Tensor]]


def convolution(draw: random.Random, small: bool) -> Case:
    """Draws a convolution over time; one in seven is depthwise."""
    groups, channels = (
        draw.choice((1, 2, 4, 8, 16)),
        draw.choice((1, 2, 3, 4, 6, 8, 10, 12, 14, 15, 16, 18, 24, 32, 40)),
    )
    outputs = draw.choice((1, 2, 3, 4, 6, 8, 14, 16, 20, 32, 48))
    if draw.random() < 1 / 7:
        groups, channels, outputs = draw.choice((2, 8, 16, 17, 32, 64)), 1, 1
    taps, stride = (
        draw.choice((1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 24, 31, 32, 48, 63, 64, 128)),
        draw.choice((1, 1, 2, 3, 5)),
    )
    padding = draw.choice((0, taps // 2, taps - 1))
    frames = max(1, taps - 2 * padding, draw.choice((1, 2, taps, taps + 7, taps + 30, 60, 200)))
    if small and frames * taps * channels * outputs * groups > FP16_PRODUCTS:
        return convolution(draw, small)
    operands = [torch.randn(2, frames, channels * groups), torch.randn(outputs * groups, channels, taps)]
    name = (
        f"convolution {channels}→{outputs} × {groups}, taps {taps}, stride {stride}, padding {padding}, {frames} frames"
    )
    return name, operands, lambda x, w: time_conv(x, w, None, stride=stride, padding=padding, groups=groups)


def linear(draw: random.Random, small: bool) -> Case:
    """Draws a linear layer."""
    inputs, outputs = (
        draw.choice((1, 2, 3, 8, 15, 16, 17, 31, 32, 80, 256)),
        draw.choice((1, 2, 5, 16, 17, 31, 48, 100, 256)),
    )
    frames = draw.choice((1, 2, 7, 16, 17, 33, 100))
    name = f"linear layer {inputs}→{outputs}, {frames} frames"
    return name, [torch.randn(2, frames, inputs), torch.randn(outputs, inputs)], F.linear


def product(draw: random.Random, small: bool) -> Case:
    """Draws a batched matrix product."""
    batch, rows = draw.choice((1, 2, 5)), draw.choice((1, 2, 15, 16, 17, 40))
    inner, columns = draw.choice((1, 2, 3, 8, 16, 31, 33, 64)), draw.choice((1, 2, 5, 16, 31, 32, 50))
    name = f"product {batch} × {rows} × {inner} × {columns}"
    return name, [torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)], torch.matmul


def attention(draw: random.Random, small: bool) -> Case:
    """Draws an attention, with or without a mask."""
    heads, size = draw.choice((1, 3, 4)), draw.choice((4, 8, 12, 16, 32, 48, 64))
    queries, keys = draw.choice((1, 5, 16, 33, 70, 200)), draw.choice((2, 5, 16, 33, 70, 200, 600))
    mask = torch.rand(2, 1, queries, keys) < 0.7 if draw.random() < 0.5 else None
    if mask is not None:
        mask[..., 0] = True
    operands = [torch.randn(2, heads, frames, size) for frames in (queries, keys, keys)]
    operands[0] *= 0.25  # small logits: a peaked softmax amplifies rounding
    name = f"attention {heads} × {size}, {queries} queries, {keys} keys, {'masked' if mask is not None else 'unmasked'}"
    return name, operands, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def results(operands: list[Tensor], compute: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Returns the output and the gradients of a fixed weighted sum of it, under autocast if `dtype`."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        cast = [leaf if dtype is None else leaf.to(dtype) for leaf in leaves]
        out = compute(*cast)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.bfloat16().to(out.dtype))]


def main() -> int:
    """Compares operations until the processor time is used up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--log", type=Path, help="file that receives each operation before it runs")
    options = parser.parse_args()
    draw, tried, wrong = random.Random(options.seed), Counter[str](), 0
    torch.manual_seed(options.seed)
    while time.process_time() < options.seconds:
        dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16))
        kind = draw.choice((convolution, linear, product, attention))
        name, operands, compute = kind(draw, small=dtype == torch.float16)
        if options.log:
            with options.log.open("a", encoding="utf-8") as file:
                print(name, dtype, file=file)
        operands = [operand.to(dtype).float() for operand in operands]
        found, exact = results(operands, compute, dtype), results(operands, compute, None)
        errors = [
            float((mine.float() - theirs).norm() / theirs.norm().clamp(min=1e-3 * theirs.numel() ** 0.5))
            for mine, theirs in zip(found, exact, strict=True)
        ]
        tried[f"{kind.__name__} {str(dtype).removeprefix('torch.')}"] += 1
        if not all(error <= LIMIT for error in errors):  # NaN too
            wrong += 1
            print(
                f"wrong: {name} in {dtype}: output, gradients {', '.join(f'{error:.2g}' for error in errors)}",
                flush=True,
            )
    print(", ".join(f"{number} {kind}" for kind, number in sorted(tried.items())) + f"; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
