"""Predictors of one value per token, the length regulator, and means of frame values over tokens (FastSpeech 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.synthesis.blocks import masked
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout


class VariancePredictor(nn.Module):
    """Predicts one value per token, (B, N, dim) to (B, N): convolution, ReLU, layer norm and dropout, twice; linear.

    arXiv 2006.04558, fig. 1c; equal to transformers' `FastSpeech2ConformerVariancePredictor`.

    Args:
        dim: channels of the input.
        inner: channels of the convolutions.
        kernel: their width, odd.
        dropout: after each of them.
    """

    def __init__(self, dim: int, inner: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(TimeConv(size, inner, kernel, padding=kernel // 2) for size in (dim, inner))
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in self.convs)
        self.out = nn.Linear(inner, 1)
        self.drop = Dropout(dropout)

    def forward(self, x_BND: Tensor, valid_BN: Tensor) -> Tensor:
        """Returns the values, (B, N) fp32, zero where `valid_BN` is False."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BND = masked(self.drop(norm(F.relu(conv(x_BND)))), valid_BN)
        values_BN1: Tensor = self.out(x_BND)
        return values_BN1[:, :, 0].float().masked_fill(~valid_BN, 0.0)


def token_of_frame(durations_BN: Tensor, frames: int) -> Tensor:
    """Returns the token that each frame belongs to, (B, frames) int64; N beyond the last one.

    Args:
        durations_BN: frames of each token, (B, N) int64.
        frames: number of frames of the result.
    """
    places_F1 = torch.arange(frames, device=durations_BN.device)[:, None]
    return (durations_BN.cumsum(1)[:, None] <= places_F1).sum(2)  # searchsorted, which ONNX lacks


def regulate(x_BND: Tensor, durations_BN: Tensor, frames: int) -> Tensor:
    """Repeats each token for its duration: (B, N, D) to (B, frames, D), zero beyond the sum of a row's durations.

    Args:
        x_BND: one vector per token.
        durations_BN: frames of each token, (B, N) int64; may be 0.
        frames: number of frames of the result.
    """
    index_BF = token_of_frame(durations_BN, frames)
    padded_BND = F.pad(x_BND, (0, 0, 0, 1))  # row N is the padding
    return padded_BND.gather(1, index_BF[:, :, None].expand(-1, -1, x_BND.shape[2]))


def token_means(values_BF: Tensor, counted_BF: Tensor, durations_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of frame values over each token, and whether the token has any counted frame, (B, N) each.

    Args:
        values_BF: one value per frame.
        counted_BF: bool, frames that count.
        durations_BN: frames of each token, int64.
    """
    index_BF = token_of_frame(durations_BN, values_BF.shape[1])
    zeros = values_BF.new_zeros(len(values_BF), durations_BN.shape[1] + 1)
    sums_BN = zeros.scatter_add(1, index_BF, values_BF.masked_fill(~counted_BF, 0.0))[:, :-1]
    counts_BN = zeros.scatter_add(1, index_BF, counted_BF.to(values_BF.dtype))[:, :-1]
    return sums_BN / counts_BN.clamp(min=1), counts_BN > 0


def filled(values_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Returns values with each unknown one replaced by the last known one before it, else by the first one after it.

    Rows without a known value are 0.
    """
    places_BN = torch.arange(values_BN.shape[1], device=values_BN.device).expand_as(values_BN)
    last_BN = places_BN.masked_fill(~known_BN, -1).cummax(1).values
    first_B1 = known_BN.to(torch.int8).argmax(1, keepdim=True)
    index_BN = torch.where(last_BN < 0, first_B1, last_BN)
    return values_BN.gather(1, index_BN).masked_fill(~known_BN.any(1, keepdim=True), 0.0)
