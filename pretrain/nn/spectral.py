"""Spectral features computed on the model's device: log-mel, MFCC, differences over time. No weights.

torchaudio provides the DCT. The rest is implemented here because of the cost of torchaudio's version (measured by
benchmarks/features.py): mel filters in double precision, since torchaudio's are up to 3e-5 off and change log-mels by
2e-5 (80 bands) to 1e-3 (256 bands), more than checkpoints trained with them tolerate; the spectrogram, since
torchaudio's centres a short window in its FFT, which requires a padded copy of the waveform and takes 1.1 times as
long; deltas of utterances of different lengths, since torchaudio's need equal lengths and a convolution group per row,
which would fix an exported graph to one batch size.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.functional import create_dct

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.streaming import Obstacle
from pretrain.nn.numerics import without_autocast, zero_padding

Normalize = Literal["utterance", "fixed"]


def utterance_statistics(normalize: Normalize) -> list[Obstacle]:
    """Returns the obstacle to streaming that a front end's field `normalize` is, if any."""
    if normalize == "fixed":
        return []
    reason = "statistics of the whole utterance are unknown in a stream; train with frontend.normalize=fixed"
    return [Obstacle("frontend.normalize", normalize, reason)]


def mel_filters(n_fft: int, n_mels: int, low_hz: float = 0.0, high_hz: float = SAMPLE_RATE / 2) -> Tensor:
    """Returns triangular filters on HTK's mel scale, (n_fft // 2 + 1, n_mels), with peaks at 1.

    Args:
        n_fft: samples of the FFT at 16 kHz.
        n_mels: number of filters.
        low_hz: lower edge of the first filter.
        high_hz: upper edge of the last filter.
    """
    hz = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (low_hz, high_hz))
    edges = 700 * (10 ** (torch.linspace(low, high, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    width = edges.diff()
    slopes = edges[None] - hz[:, None]
    rising, falling = -slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0).float()


def windows(wave_BT: Tensor, window: int, hop: int) -> Tensor:
    """Returns overlapping windows of audio, (B, F, window).

    An exported graph joins a few long copies, since onnxruntime gathers the samples of `unfold` one by one.
    """
    if not torch.compiler.is_exporting():
        return wave_BT.unfold(1, window, hop)
    n_slices = -(-window // hop)
    n_hops = (wave_BT.shape[1] - window) // hop + n_slices
    padded_BT = torch.nn.functional.pad(wave_BT, (0, n_slices * hop - window))
    hops_BNH = padded_BT.narrow(1, 0, n_hops * hop).view(wave_BT.shape[0], -1, hop)
    frames_F = torch.arange((wave_BT.shape[1] - window) // hop + 1, device=wave_BT.device)
    slices = [hops_BNH.index_select(1, frames_F + at) for at in range(n_slices)]
    return torch.cat(slices, dim=2)[:, :, :window]


def power_spectrum(frames_BFW: Tensor, n_fft: int) -> Tensor:
    """Returns the squared magnitudes of the DFT of real frames, zero-padded to n_fft samples, (B, F, n_fft // 2 + 1).

    An exported graph multiplies by cosines and sines, since onnxruntime's DFT is several times slower. Magnitudes do
    not depend on the origin of time; around the centre of the frame, cosines see only its even part and sines only its
    odd part, which have half as many samples.
    """
    if not torch.compiler.is_exporting():
        spectrum: Tensor = torch.fft.rfft(frames_BFW, n=n_fft)
        return spectrum.real.square() + spectrum.imag.square()
    if frames_BFW.shape[2] % 2:
        frames_BFW = torch.nn.functional.pad(frames_BFW, (0, 1))
    half = frames_BFW.shape[2] // 2
    before_BFH, after_BFH = frames_BFW[:, :, :half].flip(2), frames_BFW[:, :, half:]
    place_H = np.arange(half) + 0.5
    angle_HK = 2 * np.pi / n_fft * place_H[:, None] * np.arange(n_fft // 2 + 1)
    cosines_HK, sines_HK = (torch.from_numpy(part(angle_HK).astype(np.float32)) for part in (np.cos, np.sin))
    even_BFK: Tensor = (after_BFH + before_BFH) @ cosines_HK
    odd_BFK: Tensor = (after_BFH - before_BFH) @ sines_HK
    return even_BFK.square() + odd_BFK.square()


class LogMel(nn.Module):
    """Waveform to normalised log-mel frames, (B, T) to (B, F, n_mels); frame f covers samples hop·f … hop·f + window.

    Args:
        n_mels: mel bands.
        window: samples per Hann window at 16 kHz.
        hop: samples between windows.
        normalize: "utterance" brings each band of each utterance to mean 0 and standard deviation 1; "fixed" subtracts
            and divides by constants that suit speech, which also works on a stream.
    """

    FLOOR = 1e-6  # just above the power of 16-bit rounding noise in a mel band
    MEAN, STD = -5.0, 4.0

    def __init__(self, n_mels: int = 80, window: int = 400, hop: int = 160, normalize: Normalize = "utterance") -> None:
        super().__init__()
        self.window, self.hop, self.normalize = window, hop, normalize
        self.n_fft = 1 << (window - 1).bit_length()
        self.rate_hz, self.dim = SAMPLE_RATE / hop, n_mels
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", mel_filters(self.n_fft, n_mels), persistent=False)
        self.hann: Tensor
        self.filters: Tensor

    def lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of frames for each number of samples, (B,)."""
        return ((lengths_B - self.window) // self.hop + 1).clamp(min=0)

    def log_power(self, wave_BT: Tensor) -> Tensor:
        """Returns the features before their normalisation, (B, F, n_mels) fp32, with a gradient; call without autocast.

        Args:
            wave_BT: (B, T) samples at 16 kHz, at least one window.
        """
        frames_BFW = windows(wave_BT.float(), self.window, self.hop)
        return torch.log(power_spectrum(frames_BFW * self.hann, self.n_fft) @ self.filters + self.FLOOR)

    @torch.no_grad()
    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> Frames:
        """Returns features, zero beyond each utterance's length.

        Args:
            wave_BT: (B, T) samples at 16 kHz.
            lengths_B: (B,) valid samples.

        Raises:
            ValueError: not even one window fits.
        """
        if wave_BT.shape[1] < self.window:
            raise ValueError(f"audio of {wave_BT.shape[1]} samples is shorter than one window of {self.window}")
        with without_autocast(wave_BT.device):
            mel_BFD = self.log_power(wave_BT)
            lengths_B = self.lengths(lengths_B)
            if self.normalize == "fixed":
                return Frames(zero_padding((mel_BFD - self.MEAN) / self.STD, lengths_B), lengths_B, self.rate_hz)
            return Frames(normalize_frames(mel_BFD, lengths_B), lengths_B, self.rate_hz)


class TorchaudioMfcc(nn.Module):
    """MFCC by torchaudio's definition (`transforms.MFCC(log_mels=True)`) with Δ and ΔΔ, at 100 Hz.

    13 cepstra of natural-log HTK mels, orthonormal DCT, no pre-emphasis and no liftering; each of the 39 channels is
    brought to mean 0 and standard deviation 1 per utterance. Kaldi's definition, from which HuBERT's first labels are
    computed (Hsu et al. 2021, §IV-B), is `data_pipeline.labels.features.kaldi_mfcc`.
    """

    N_CEPSTRA = 13
    MEANS = (3.5, 2.0, *[0.0] * 11)
    STDS = (4.7, 2.0, 1.2, 1.1, 0.9, 0.8, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.35)
    SLOPE_STDS = (0.16, 0.06)
    """normalize=fixed: means and deviations of the cepstra, and of Δ and ΔΔ relative to them (156 recordings)."""

    def __init__(self, n_mels: int = 23, window: int = 400, normalize: Normalize = "utterance") -> None:
        super().__init__()
        self.mel = LogMel(n_mels, window, normalize="fixed")
        self.normalize = normalize
        self.rate_hz, self.dim = self.mel.rate_hz, 3 * self.N_CEPSTRA
        self.register_buffer("dct_MC", create_dct(self.N_CEPSTRA, n_mels, "ortho"), persistent=False)
        stds = torch.tensor(self.STDS)
        fixed_2D = torch.stack(
            [
                torch.tensor([*self.MEANS, *[0.0] * (2 * self.N_CEPSTRA)]),
                torch.cat([stds, *(ratio * stds for ratio in self.SLOPE_STDS)]),
            ]
        )
        self.register_buffer("fixed_2D", fixed_2D, persistent=False)
        self.dct_MC: Tensor
        self.fixed_2D: Tensor

    def lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of frames for each number of samples, (B,)."""
        return self.mel.lengths(lengths_B)

    @torch.no_grad()
    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> Frames:
        return self.between(wave_BT, torch.zeros_like(lengths_B), self.mel.lengths(lengths_B))

    @torch.no_grad()
    def between(self, wave_BT: Tensor, first_B: Tensor, lengths_B: Tensor) -> Frames:
        """Returns the features of audio of which only some frames count, zero beyond `lengths_B`.

        Args:
            wave_BT: (B, T) samples at 16 kHz.
            first_B: the first frame that counts; the slopes of those around it use no earlier one.
            lengths_B: frames up to the last one that counts.
        """
        with without_autocast(wave_BT.device):
            mel: Frames = self.mel(wave_BT, torch.full_like(lengths_B, wave_BT.shape[1]))
            cepstra_BFC = mel.x_BFD @ self.dct_MC
            first_BFC = delta(cepstra_BFC, lengths_B, starts_B=first_B)
            x_BFD = torch.cat([cepstra_BFC, first_BFC, delta(first_BFC, lengths_B, starts_B=first_B)], dim=2)
            if self.normalize == "fixed":
                mean_D, std_D = self.fixed_2D.unbind()
                return Frames(zero_padding((x_BFD - mean_D) / std_D, lengths_B), lengths_B, self.rate_hz)
            return Frames(normalize_frames(x_BFD, lengths_B), lengths_B, self.rate_hz)


def delta(x_BFD: Tensor, lengths_B: Tensor, reach: int = 2, starts_B: Tensor | None = None) -> Tensor:
    """Returns regression slopes over ±reach frames, (B, F, D).

    Args:
        x_BFD: frames.
        lengths_B: frames up to the last one of each row, which is repeated beyond.
        reach: frames on either side.
        starts_B: first frame of each row, which is repeated before; None: 0.
    """
    first = torch.zeros_like(lengths_B)[:, None] if starts_B is None else starts_B[:, None]
    first, last = (bound.to(x_BFD.device) for bound in (first, torch.maximum(lengths_B[:, None] - 1, first)))
    at = torch.arange(x_BFD.shape[1], device=x_BFD.device)[None]
    slope = torch.zeros_like(x_BFD)
    for step in range(1, reach + 1):
        ahead, behind = torch.minimum(at + step, last), torch.maximum(at - step, first)
        rows = torch.arange(x_BFD.shape[0], device=x_BFD.device)[:, None]
        slope += step * (x_BFD[rows, ahead] - x_BFD[rows, behind])
    return slope / (2 * sum(step * step for step in range(1, reach + 1)))


def normalize_frames(x_BFD: Tensor, lengths_B: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises each channel of each utterance to mean 0 and deviation 1 over its valid frames; zero beyond them."""
    n_B11 = lengths_B.to(x_BFD.device, non_blocking=True).clamp(min=1)[:, None, None]
    centred = zero_padding(x_BFD - zero_padding(x_BFD, lengths_B).sum(1, keepdim=True) / n_B11, lengths_B)
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / n_B11 + eps)


def normalize_wave(wave_BT: Tensor, lengths_B: Tensor, eps: float = 1e-7) -> Tensor:
    """Returns each utterance with mean 0 and deviation 1 over its samples, as the released feature extractors do."""
    return normalize_frames(wave_BT[:, :, None], lengths_B, eps)[:, :, 0]
