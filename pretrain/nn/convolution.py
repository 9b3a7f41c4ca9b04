"""Convolution over time of frames as everything else keeps them, (B, F, D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_conv(
    x_BFD: Tensor, weight_EDK: Tensor, bias_E: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """(B, F, D) to (B, F', E), as `conv1d` on (B, D, F).

    On a CPU, oneDNN is up to four times faster where channels lie next to each other, which they do here: grouped
    convolutions in any precision, full ones in bf16 or fp16 only. One input channel is an exception (docs/findings.md).
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BFD.dtype
    reduced = dtype in (torch.bfloat16, torch.float16)
    if x_BFD.device.type != "cpu" or x_BFD.shape[2] == 1 or (groups == 1 and not reduced):
        return F.conv1d(x_BFD.transpose(1, 2), weight_EDK, bias_E, stride, padding, 1, groups).transpose(1, 2)
    image_BD1F = x_BFD.transpose(1, 2)[:, :, None]
    weight_ED1K = weight_EDK.to(dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
    y_BE1F = F.conv2d(image_BD1F, weight_ED1K, bias_E, (1, stride), (0, padding), 1, groups)
    return y_BE1F[:, :, 0].transpose(1, 2)


class TimeConv(nn.Conv1d):
    """`nn.Conv1d` that takes and gives (B, F, D)."""

    def __init__(
        self, in_dim: int, dim: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_dim, dim, kernel, stride, padding, groups=groups, bias=bias)

    def forward(self, x_BFD: Tensor) -> Tensor:
        assert isinstance(self.padding, tuple)
        return time_conv(x_BFD, self.weight, self.bias, self.stride[0], self.padding[0], self.groups)
