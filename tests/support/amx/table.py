"""Errors of bf16 convolutions against fp32, as a table: `python -m tests.support.amx -- -m tests.support.amx.table`.

Shapes are those of positional convolutions. Each error is the largest ‖bf16 − fp32‖ / ‖fp32‖ of the output and both
gradients over GROUPS; torch's own conv1d is on the left, the project's `time_conv` on the right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.nn.convolution import time_conv

KERNELS = (2, 3, 4, 8, 16, 31, 32, 64, 127, 128)
CHANNELS = (1, 2, 3, 4, 6, 8, 10, 12, 13, 14, 16, 24)
GROUPS = (1, 4, 16)
FRAMES = 50
ROUNDING = 0.01
"""Largest error that rounding to bf16 explains."""


def conv1d(x_BFD: Tensor, weight_EDK: Tensor, padding: int, groups: int) -> Tensor:
    """Convolves by torch's conv1d alone."""
    return F.conv1d(x_BFD.transpose(1, 2), weight_EDK, None, 1, padding, 1, groups).transpose(1, 2)


def project(x_BFD: Tensor, weight_EDK: Tensor, padding: int, groups: int) -> Tensor:
    """Convolves by `time_conv`."""
    return time_conv(x_BFD, weight_EDK, None, stride=1, padding=padding, groups=groups)


def error(convolve: Callable[[Tensor, Tensor, int, int], Tensor], kernel: int, channels: int, groups: int) -> float:
    """Returns the largest relative error of the output and both gradients in bf16."""
    generator, dim = torch.Generator().manual_seed(0), channels * groups
    operands = [
        torch.randn(size, generator=generator).bfloat16().float().requires_grad_()
        for size in ((2, FRAMES, dim), (dim, channels, kernel))
    ]
    exact = conv1d(operands[0], operands[1], kernel // 2, groups)
    direction = torch.randn(exact.shape, generator=generator).bfloat16().float()
    wanted = [exact, *torch.autograd.grad(exact, operands, direction)]
    with torch.autocast("cpu", torch.bfloat16):
        out = convolve(operands[0], operands[1], kernel // 2, groups)
    found = [out, *torch.autograd.grad(out, operands, direction.bfloat16())]
    return max(
        float(((mine.float() - theirs).norm() / theirs.norm()).detach())
        for mine, theirs in zip(found, wanted, strict=True)
    )


def main() -> int:
    """Prints the table, and returns 1 if `time_conv` is wrong for a shape."""
    print("| channels per group | " + " | ".join(f"kernel {kernel}" for kernel in KERNELS) + " |")
    print("|---" * (1 + len(KERNELS)) + "|")
    wrong = {conv1d: 0, project: 0}
    for channels in CHANNELS:
        cells = []
        for kernel in KERNELS:
            errors = {way: [error(way, kernel, channels, groups) for groups in GROUPS] for way in wrong}
            for way in wrong:
                wrong[way] += sum(not value <= ROUNDING for value in errors[way])
            cells.append(" / ".join(f"{max(errors[way]):.3f}" for way in wrong))
        print(f"| {channels} | " + " | ".join(cells) + " |", flush=True)
    shapes = len(KERNELS) * len(CHANNELS) * len(GROUPS)
    print(f"\nWrong by more than {ROUNDING:g}: conv1d {wrong[conv1d]}, time_conv {wrong[project]} of {shapes} shapes.")
    return int(wrong[project] > 0)


if __name__ == "__main__":
    sys.exit(main())
