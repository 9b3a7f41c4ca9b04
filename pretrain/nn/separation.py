"""Measures and transforms of source separation: permutations, signal-to-noise ratios, spectra that can be inverted.

Shape suffixes: S sources, K frames of a spectrogram, C its bins.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


def si_snr(estimates_T: Tensor, targets_T: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Returns the scale-invariant signal-to-noise ratio in dB (Le Roux et al. 2019), (…).

    Args:
        estimates_T: (…, T) samples.
        targets_T: (…, T) samples.
        lengths: valid samples, broadcast against (…); both are 0 beyond. None: all.
    """
    if lengths is None:
        lengths = torch.tensor(targets_T.shape[-1])
    lengths = lengths.to(targets_T.device, non_blocking=True)
    n = lengths.clamp(min=1)[..., None]
    valid_T = torch.arange(targets_T.shape[-1], device=targets_T.device) < lengths[..., None]
    estimates_T, targets_T = ((x - x.sum(-1, keepdim=True) / n) * valid_T for x in (estimates_T, targets_T))
    eps = torch.finfo(targets_T.dtype).eps
    scale = ((estimates_T * targets_T).sum(-1, keepdim=True) + eps) / (targets_T.square().sum(-1, keepdim=True) + eps)
    aligned_T = scale * targets_T
    signal, noise = aligned_T.square().sum(-1), (estimates_T - aligned_T).square().sum(-1)
    return 10 * torch.log10((signal + eps) / (noise + eps))


def negative_snr(estimates_T: Tensor, targets_T: Tensor, mixture_T: Tensor, limit_db: float = 30.0) -> Tensor:
    """Returns the negative signal-to-noise ratio in dB, (…), with a soft limit (Wisdom et al. 2020, MixIT, eq. 2).

    A silent target has no such ratio: its cost is the level of the estimate relative to the mixture's, with the same
    limit (Wisdom et al. 2021, arXiv 2011.00803, eq. 2).

    Args:
        estimates_T: (…, T) samples, 0 beyond each length, like targets and mixture.
        targets_T: (…, T) samples.
        mixture_T: (…, T) samples of the signal that was separated.
        limit_db: ratio beyond which an estimate hardly gains.
    """
    tau = 10 ** (-limit_db / 10)
    power = targets_T.square().sum(-1)
    reference = torch.where(power > 0, power, mixture_T.square().sum(-1))
    error = (estimates_T - targets_T).square().sum(-1)
    return 10 * torch.log10((error + tau * reference + EPS) / (reference + EPS))


class Assignment(NamedTuple):
    """The best order of estimates.  cost_B: its sum of costs.  order_BS: the estimate of each target."""

    cost_B: Tensor
    order_BS: Tensor

    def arranged(self, estimates: Tensor) -> Tensor:
        """Returns (B, S, …) estimates in the order of their targets."""
        index = self.order_BS.reshape(*self.order_BS.shape, *[1] * (estimates.ndim - 2)).expand_as(estimates)
        return estimates.gather(1, index)


def best_assignment(cost_BSS: Tensor) -> Assignment:
    """Finds the permutation with the least sum of costs, one for each row (Yu et al. 2017, PIT).

    Args:
        cost_BSS: cost of each estimate (first S) for each target (second S).

    Returns:
        Its cost, with the gradient of the chosen entries.
    """
    sources = cost_BSS.shape[1]
    orders_PS = torch.tensor(list(itertools.permutations(range(sources))), device=cost_BSS.device)
    targets_S = torch.arange(sources, device=cost_BSS.device)
    sums_BP = cost_BSS[:, orders_PS, targets_S].sum(-1)
    best_B = sums_BP.detach().argmin(1)
    return Assignment(sums_BP.gather(1, best_B[:, None])[:, 0], orders_PS[best_B])


def clustering_loss(embeddings_BNE: Tensor, shares_BNS: Tensor, weights_BN: Tensor) -> Tensor:
    """Returns the deep clustering loss of each row, (B,): the weighted Frobenius norm of VVᵀ − YYᵀ, squared.

    (Hershey et al. 2016, eq. 2; weights by magnitude: Wang, Le Roux and Hershey 2018, § 2.1.)

    Args:
        embeddings_BNE: V, a unit vector of each bin.
        shares_BNS: Y, one-hot: the loudest source of each bin.
        weights_BN: of the bins, non-negative; with a sum of 1 the loss is between 0 and 2.
    """
    root_BN1 = weights_BN.sqrt()[:, :, None]
    v_BNE, y_BNS = embeddings_BNE * root_BN1, shares_BNS * root_BN1

    def squared(x_BNE: Tensor, z_BNE: Tensor) -> Tensor:
        return (x_BNE.transpose(1, 2) @ z_BNE).square().sum((1, 2))

    return squared(v_BNE, v_BNE) - 2 * squared(v_BNE, y_BNS) + squared(y_BNS, y_BNS)


class Spectra(nn.Module):
    """Short-time Fourier transform and its inverse; frame k is centred on sample hop·k.

    Args:
        window: samples of the Hann window, even.
        hop: samples between frames, at most half a window.
    """

    def __init__(self, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop, self.bins = window, hop, window // 2 + 1
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.hann: Tensor

    def lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of frames that touch each row's samples, (B,)."""
        frames_B = (lengths_B - 1 + self.window // 2) // self.hop + 1
        return torch.where(lengths_B > 0, frames_B, 0)

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Returns complex spectra, (B, K, C), of (B, T) samples; rows shorter than T are zero beyond their length."""
        # half a window before; after it a window more, so that a row's last frames do not depend on the longest row
        padded_BT = F.pad(wave_BT, (self.window // 2, self.window + self.window // 2))
        spectra_BKC: Tensor = torch.fft.rfft(padded_BT.unfold(1, self.window, self.hop) * self.hann)
        return spectra_BKC

    def inverse(self, spectra_BKC: Tensor, samples: int) -> Tensor:
        """Returns the first `samples` samples, (B, T), of all frames of `forward`.

        As torch.istft (Griffin and Lim 1984, eq. 6), which makes the host wait for a check of the windows' sum.
        """
        frames_BKW = torch.fft.irfft(spectra_BKC, n=self.window) * self.hann
        windows_1KW = self.hann.square().expand(1, frames_BKW.shape[1], -1)
        sum_BT, weight_1T = self._overlap(frames_BKW), self._overlap(windows_1KW)
        inside = slice(self.window // 2, self.window // 2 + samples)
        return sum_BT[:, inside] / weight_1T[:, inside]

    def _overlap(self, frames_BKW: Tensor) -> Tensor:
        """Returns the sum of frames at their places, (B, T)."""
        size, length = self.window, (frames_BKW.shape[1] - 1) * self.hop + self.window
        summed_B11T = F.fold(frames_BKW.transpose(1, 2), (1, length), (1, size), stride=(1, self.hop))
        return summed_B11T[:, 0, 0]
