"""Small numerical helpers: gradient scaling, regions of full fp32 precision, frame stacking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.interfaces.frames import Frames, valid_frames


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Returns `x` and multiplies its gradient by `scale` (fairseq's feature_grad_mult).

    It scales the gradient of this backward pass, never gradients that were accumulated before.
    """
    if scale == 1.0:
        return x
    if scale == 0.0:
        return x.detach()
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast; the meta device, on which operations are only counted, has none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disables autocast and TF32: code look-ups and losses need full fp32."""
    with without_autocast(device):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def stack_frames(frames: Frames, ratio: int) -> Frames:
    """Joins `ratio` adjacent frames into one: (B, F, D) to (B, F // ratio, ratio · D). A remainder is dropped."""
    if ratio == 1:
        return frames
    B, F, D = frames.x_BFD.shape
    kept = F // ratio
    x_BFD = frames.x_BFD[:, : kept * ratio].reshape(B, kept, ratio * D)
    return Frames(x_BFD, frames.lengths_B // ratio, frames.rate_hz / ratio)


def first_frames(x_BFD: Tensor, n: int) -> Tensor:
    """Returns the first n frames.

    An exported graph copies them: whether a slice is contiguous depends on n, and a graph cannot branch on sizes.
    """
    if torch.compiler.is_exporting():
        return x_BFD.index_select(1, torch.arange(n, device=x_BFD.device))
    return x_BFD[:, :n]


def pad_audio(wave_BT: Tensor, samples: int) -> Tensor:
    """Pads (B, T) audio with zeros to at least `samples` samples, so that a convolution has a whole window."""
    missing = samples - wave_BT.shape[1]
    return torch.nn.functional.pad(wave_BT, (0, missing)) if missing > 0 else wave_BT


def zero_padding(x_BFD: Tensor, lengths_B: Tensor) -> Tensor:
    """Returns `x_BFD` with zeros beyond each length."""
    valid_BF = valid_frames(lengths_B, x_BFD.shape[1], x_BFD.device)
    return x_BFD.masked_fill(~valid_BF[:, :, None], 0.0)


@torch.no_grad()
def histogram(index_N: Tensor, n: int) -> Tensor:
    """Counts 0 … n - 1 in `index_N`, (n,) fp32; negative values are not counted.

    Unlike torch.bincount it does not synchronise with the GPU.
    """
    counts_V = torch.zeros(n, device=index_N.device)
    return counts_V.index_add_(0, index_N.clamp(min=0), (index_N >= 0).float())


@torch.no_grad()
def masked_deviation(x_BFD: Tensor, mask_BF: Tensor) -> Tensor:
    """Returns the standard deviation over the selected frames of a batch, averaged over channels.

    Without boolean indexing, which would synchronise with the GPU.
    """
    weight_BF1 = mask_BF[:, :, None].float()
    n = weight_BF1.sum().clamp(min=1)
    x_BFD = x_BFD.detach().float()
    centred = (x_BFD - (x_BFD * weight_BF1).sum((0, 1)) / n) * weight_BF1
    return (centred.square().sum((0, 1)) / n).sqrt().mean()


def rate_ratio(feature_rate_hz: float, rate_hz: float) -> int:
    """Returns the feature frames per encoder frame. Raises ValueError unless it is a whole number."""
    ratio = round(feature_rate_hz / rate_hz)
    if ratio < 1 or abs(feature_rate_hz - ratio * rate_hz) > 1e-6:
        raise ValueError(f"features at {feature_rate_hz} Hz do not divide into frames at {rate_hz} Hz")
    return ratio


def row_numbers(values_BN: Tensor) -> Tensor:
    """Returns a number for each row of whole numbers, (B, N) to (B,) int64, that is equal for equal rows.

    Trailing zeros do not change it, so it does not depend on padding. Rows that differ have equal numbers with a
    probability of about 2^-63; a row of zeros has 0.
    """
    columns_N = torch.arange(1, values_BN.shape[1] + 1, device=values_BN.device)
    mixed_BN = values_BN.long() * _mixed(columns_N)
    return mixed_BN.sum(1)


def _mixed(numbers: Tensor) -> Tensor:
    """Returns pseudo-random int64 of whole numbers (SplitMix64's finaliser; products overflow on purpose)."""
    z = numbers * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
