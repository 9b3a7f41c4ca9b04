"""Position encodings: convolutional (relative), rotary, and sinusoidal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.convolution import ConvShape, TimeConv, time_conv


class ConvPositions(nn.Module):
    """Relative positions from one wide grouped convolution with weight norm over taps (wav2vec 2.0, §2).

    Weight norm is computed in `forward`, because ZeRO-3 gathers a parameter only in the forward pass of its owner.
    """

    def __init__(self, dim: int, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"positional convolution: {dim} channels do not divide into {groups} groups")
        self.kernel, self.groups = kernel, groups
        self.shape = ConvShape(dim, dim, kernel, padding=kernel // 2, groups=groups)
        weight = torch.empty(dim, dim // groups, kernel).normal_(0.0, math.sqrt(4.0 / (kernel * dim)))
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BFD: Tensor, inside_BF1: Tensor | None = None) -> Tensor:
        """Returns the position features to add to `x_BFD` (B, F, D), which must be 0 between packed utterances."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        y_BFD = time_conv(x_BFD, weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        if self.kernel % 2 == 0:
            y_BFD = y_BFD[:, :-1]
        return F.gelu(y_BFD)


class ConvPositionsStack(nn.Module):
    """Several narrower convolutions, each followed by a layer norm without weights and GELU (data2vec, §4.2)."""

    def __init__(self, dim: int, kernel: int = 19, groups: int = 16, depth: int = 5) -> None:
        super().__init__()
        if dim % groups or kernel % 2 == 0:
            raise ValueError(f"positional convolutions need an odd kernel, not {kernel}, and groups that divide {dim}")
        self.kernel = kernel
        self.convs = nn.ModuleList(TimeConv(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth))

    def forward(self, x_BFD: Tensor, inside_BF1: Tensor | None = None) -> Tensor:
        """Returns the position features to add to `x_BFD` (B, F, D).

        inside_BF1: False between packed utterances, where the input of each convolution is set to 0.
        """
        for conv in self.convs:
            if inside_BF1 is not None:
                x_BFD = x_BFD * inside_BF1
            y_BFD = conv(x_BFD)
            x_BFD = F.gelu(F.layer_norm(y_BFD, y_BFD.shape[-1:]))
        return x_BFD


def rotary_angles(places: Tensor, head_dim: int, skip: int = 0, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the rotary angles (RoFormer, arXiv 2104.09864, eq. 34), computed in fp64, rounded to fp32.

    In fp32 the angles of the frames after an hour (place 90,000 at 25 Hz) would be wrong by 0.005.

    Args:
        places: time indices of the frames, (F,) or (B, F).
        head_dim: channels per attention head.
        skip: leading frames without a time index (registers); their angle is 0, like that of the first frame.
        base: longest wavelength in frames, divided by 2π.

    Returns:
        Two tensors (skip + F, head_dim / 2), or (B, 1, skip + F, head_dim / 2) where `places` has rows.
    """
    places = F.pad(places.double(), (skip, 0))
    rates = base ** (-torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float64) / head_dim)
    angles = places[..., None] * rates
    if places.ndim == 2:
        angles = angles[:, None]
    if torch.compiler.is_exporting():  # onnxruntime of devices has no cosine of doubles
        angles = (angles - (angles / math.tau).long() * math.tau).float()
    return angles.cos().float(), angles.sin().float()


def rotate(x_BHFC: Tensor, cos_FC: Tensor, sin_FC: Tensor) -> Tensor:
    """Rotates the channel pairs (c, c + C/2) of each head, (B, H, F, C), by the angle of their frame."""
    first, second = x_BHFC.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_FC - second * sin_FC, second * cos_FC + first * sin_FC], dim=-1)
    return turned.type_as(x_BHFC)


def sinusoids(places_N: Tensor, dim: int, interleaved: bool = False) -> Tensor:
    """Returns sinusoidal position vectors, (N, dim) (arXiv 1706.03762, section 3.5).

    Args:
        places_N: positions.
        dim: channels.
        interleaved: sines and cosines alternate, as in the paper; otherwise the sines come first, as in fairseq and
            transformers, and the longest wavelength is 10,000 · 2π exactly.
    """
    half, device = dim // 2, places_N.device
    if interleaved:
        angles = places_N[:, None] * torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10_000) / dim))
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]
    angles = places_N[:, None] * torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half, device=device))
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim - 2 * half))
