"""Convolution over the time axis of (B, F, D) frames, with a kernel that is correct in the current precision.

oneDNN 3.12 (torch 2.13) has three faults in 16 bits, without a message. On CPUs with AMX, convolutions of few input
channels per group have a relative error of 1.0: where the channels are even and fewer than 16, and channels times taps
is a multiple of 32 above 32. And a depthwise convolution of at most 16 channels, 15 or more taps and more than 30
frames never returns, since its code generator runs out of registers and loops: bf16 in channels-last layout on CPUs
with AVX512-BF16, fp16 on CPUs with AVX512-FP16. `default_route` avoids all even kernels of so few channels and all such
depthwise ones, on every CPU. Last, gradients of taps that meet only padding are left uninitialised in convolutions with
a stride; `time_conv` computes those of so few frames in fp32. pretrain/profiling/operation_check.py checks the shapes
of a model at start-up and overrides the route of any other shape that is wrong.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCED = (torch.bfloat16, torch.float16)
"""16-bit floating-point types."""
FEW_CHANNELS = 15
"""Input channels per group up to which oneDNN's even 16-bit kernels are not trusted."""
HANGING_CHANNELS, HANGING_TAPS = 16, 15
"""Most channels and fewest taps of a 16-bit depthwise convolution in which oneDNN can hang."""
Route = Literal["direct", "odd_kernel", "fp32"]
"""How a convolution is computed: directly; with a zero tap appended to its kernel, which is exact; or in fp32."""


class ConvShape(NamedTuple):
    """The parameters of a convolution that select its kernel, apart from device and precision."""

    in_dim: int
    dim: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


_OVERRIDES: dict[tuple[str, torch.dtype, ConvShape], Route] = {}


def default_route(device_type: str, dtype: torch.dtype, shape: ConvShape) -> Route:
    """Returns the route that avoids the known faults of oneDNN, without any measurement."""
    if device_type != "cpu" or dtype not in REDUCED:
        return "direct"
    if shape.groups > 1 and shape.in_dim == shape.groups:
        return "fp32" if shape.in_dim <= HANGING_CHANNELS and shape.kernel >= HANGING_TAPS else "direct"
    few = shape.in_dim // shape.groups <= FEW_CHANNELS
    return "odd_kernel" if few and shape.kernel % 2 == 0 else "direct"


def override_route(device_type: str, dtype: torch.dtype, shape: ConvShape, route: Route | None) -> None:
    """Sets the route of a shape for the rest of the process; None restores the default.

    Args:
        device_type: such as "cpu".
        dtype: of the product.
        shape: of the convolution.
        route: how it is computed; None: `default_route`.
    """
    if route is None:
        _OVERRIDES.pop((device_type, dtype, shape), None)
    else:
        _OVERRIDES[device_type, dtype, shape] = route


def time_conv(
    x_BFD: Tensor, weight_EDK: Tensor, bias_E: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Convolves frames over time, as `conv1d` does on (B, D, F).

    Args:
        x_BFD: input frames, (B, F, D).
        weight_EDK: kernels, (E, D / groups, K).
        bias_E: (E,), or None.
        stride: input frames per output frame.
        padding: zero frames on either side.
        groups: groups of channels.

    Returns:
        (B, F', E) with F' = (F + 2 · padding − K) // stride + 1, in autocast's type where autocast is on.
    """
    device = x_BFD.device.type
    under_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if under_autocast else x_BFD.dtype
    if dtype not in REDUCED:
        return _convolve(x_BFD, weight_EDK, bias_E, stride=stride, padding=padding, groups=groups)
    shape = ConvShape(
        x_BFD.shape[2], weight_EDK.shape[0], weight_EDK.shape[2], stride=stride, padding=padding, groups=groups
    )
    route = _OVERRIDES.get((device, dtype, shape)) or default_route(device, dtype, shape)
    only_padding = padding > 0 and stride > 1 and x_BFD.shape[1] < shape.kernel + stride
    if route == "fp32" or (only_padding and device == "cpu"):
        with torch.autocast(device, enabled=False):
            bias = None if bias_E is None else bias_E.float()
            exact = _convolve(x_BFD.float(), weight_EDK.float(), bias, stride=stride, padding=padding, groups=groups)
            return exact.to(dtype)
    if route == "odd_kernel":
        # the appended frame is multiplied by the zero tap only; the number of output frames stays the same
        x_BFD, weight_EDK = F.pad(x_BFD, (0, 0, 0, 1)), F.pad(weight_EDK, (0, 1))
    return _convolve(x_BFD, weight_EDK, bias_E, stride=stride, padding=padding, groups=groups)


def _convolve(
    x_BFD: Tensor, weight_EDK: Tensor, bias_E: Tensor | None, stride: int, padding: int, groups: int
) -> Tensor:
    """Computes `time_conv` in the fastest memory layout.

    On a CPU, oneDNN is up to four times faster with adjacent channels, the layout of (B, F, D): for grouped
    convolutions in any precision, for others in 16 bits only, and not for a single input channel.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BFD.dtype
    if x_BFD.device.type != "cpu" or x_BFD.shape[2] == 1 or (groups == 1 and dtype not in REDUCED):
        return F.conv1d(x_BFD.transpose(1, 2), weight_EDK, bias_E, stride, padding, 1, groups).transpose(1, 2)
    image_BD1F = x_BFD.transpose(1, 2)[:, :, None]
    weight_ED1K = weight_EDK.to(dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
    y_BE1F = F.conv2d(image_BD1F, weight_ED1K, bias_E, (1, stride), (0, padding), 1, groups)
    return y_BE1F[:, :, 0].transpose(1, 2)


class TimeConv(nn.Conv1d):
    """`nn.Conv1d` on (B, F, D) instead of (B, D, F)."""

    def __init__(
        self, in_dim: int, dim: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_dim, dim, kernel, stride, padding, groups=groups, bias=bias)
        self.shape = ConvShape(in_dim, dim, kernel, stride=stride, padding=padding, groups=groups)

    def forward(self, x_BFD: Tensor) -> Tensor:
        _, _, _, stride, padding, groups = self.shape
        return time_conv(x_BFD, self.weight, self.bias, stride=stride, padding=padding, groups=groups)
