"""Vocoders from mel frames to audio: an inverse STFT of predicted spectra, and Griffin-Lim's iteration beside it."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.models.synthesis.blocks import masked
from pretrain.nn.convolution import TimeConv
from pretrain.nn.numerics import full_precision
from pretrain.nn.spectral import LogMel

FFT = 640
"""Samples of the vocoder's windows: four hops."""
LOUDEST = 5.0
"""Largest logarithm of a magnitude, against overflow."""


@config
class VocoderConfig:
    """Sizes of the iSTFT vocoder; the defaults are Vocos' (arXiv 2306.00814)."""

    dim: Annotated[int, about("channels", ge=1)] = 512
    layers: Annotated[int, about("ConvNeXt blocks", ge=1)] = 8
    inner: Annotated[int, about("channels inside of each block", ge=1)] = 1536


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over 7 frames, layer norm, and two linear layers, scaled and added to the input."""

    def __init__(self, dim: int, inner: int, scale: float) -> None:
        super().__init__()
        self.depthwise = TimeConv(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand, self.contract = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.scale_D = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x_BFD: Tensor, valid_BF: Tensor) -> Tensor:
        y_BFD = self.contract(F.gelu(self.expand(self.norm(self.depthwise(x_BFD)))))
        return masked(x_BFD + self.scale_D * y_BFD, valid_BF)


class InverseSTFT(nn.Module):
    """Overlap-add of inverse Fourier transforms: spectra (B, F, FFT // 2 + 1) of frames to samples.

    Frame f is centred on sample hop · f + window / 2 of the audio whose mel frame f covers hop · f … hop · f + window,
    so that F frames give hop · (F − 1) + window samples. The transform is a transposed convolution with fixed kernels,
    which exports to any runtime.

    Args:
        window: samples of a mel window, at most FFT and even.
        hop: samples between frames.
    """

    def __init__(self, window: int, hop: int) -> None:
        super().__init__()
        self.hop, self.trim = hop, (FFT - window) // 2
        phase = 2 * torch.pi / FFT * torch.outer(torch.arange(FFT // 2 + 1), torch.arange(FFT)).double()
        share = torch.full((FFT // 2 + 1, 1), 2.0 / FFT).double()
        share[[0, -1]] /= 2
        hann = torch.hann_window(FFT, dtype=torch.float64)
        kernels = torch.cat([share * phase.cos() * hann, -share * phase.sin() * hann])
        self.register_buffer("kernels_C1T", kernels[:, None].float(), persistent=False)
        self.register_buffer("squared_11T", hann.square()[None, None].float(), persistent=False)
        self.kernels_C1T: Tensor
        self.squared_11T: Tensor

    def forward(self, real_BFK: Tensor, imaginary_BFK: Tensor, valid_BF: Tensor) -> Tensor:
        """Returns (B, T) samples, zero beyond each row's frames.

        Args:
            real_BFK, imaginary_BFK: spectra, zero where `valid_BF` is False.
            valid_BF: bool.
        """
        spectra_BCF = torch.cat([real_BFK, imaginary_BFK], dim=2).transpose(1, 2)
        wave_B1T = F.conv_transpose1d(spectra_BCF, self.kernels_C1T, stride=self.hop)
        weight_B1T = F.conv_transpose1d(valid_BF[:, None].to(wave_B1T.dtype), self.squared_11T, stride=self.hop)
        wave_BT = (wave_B1T / weight_B1T.clamp(min=1e-3))[:, 0]
        return wave_BT[:, self.trim : wave_BT.shape[1] - self.trim]


class ISTFTVocoder(nn.Module):
    """Predicts magnitude and phase of each frame's spectrum from mel frames (Vocos, arXiv 2306.00814); no recursion.

    The log magnitude is added to one interpolated from the mel bands, so that an untrained vocoder has the right
    envelope already.
    """

    def __init__(self, config: VocoderConfig, mel: LogMel) -> None:
        super().__init__()
        bins = FFT // 2 + 1
        self.take_in = TimeConv(mel.dim, config.dim, 7, padding=3)
        self.norm = nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.inner, 1 / config.layers) for _ in range(config.layers)
        )
        self.last_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, 2 * bins)
        nn.init.normal_(self.out.weight, std=0.02)
        self.inverse = InverseSTFT(mel.window, mel.hop)
        self.register_buffer("envelope_MK", envelope(mel), persistent=False)
        self.envelope_MK: Tensor
        self.mean, self.std = 0.5 * mel.MEAN, 0.5 * mel.STD  # of log magnitudes: half of log powers

    def forward(self, mel_BFD: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns (B, hop · (F − 1) + window) samples, zero beyond each row's frames.

        Args:
            mel_BFD: normalised log-mel frames, F at least 1.
            lengths_B: valid frames of each row, int64.
        """
        valid_BF = torch.arange(mel_BFD.shape[1], device=lengths_B.device) < lengths_B[:, None]
        mel_BFD = masked(mel_BFD, valid_BF)
        x_BFD = masked(self.norm(self.take_in(mel_BFD)), valid_BF)
        for block in self.blocks:
            x_BFD = block(x_BFD, valid_BF)
        with full_precision(mel_BFD.device):
            base_BFK = self.std * (mel_BFD.float() @ self.envelope_MK) + self.mean
        log_BFK, phase_BFK = self.out(self.last_norm(x_BFD)).float().chunk(2, dim=2)
        with full_precision(mel_BFD.device):
            magnitude_BFK = masked((base_BFK + log_BFK).clamp(max=LOUDEST).exp(), valid_BF)
            wave_BT: Tensor = self.inverse(magnitude_BFK * phase_BFK.cos(), magnitude_BFK * phase_BFK.sin(), valid_BF)
        return wave_BT


def envelope(mel: LogMel) -> Tensor:
    """Returns weights (n_mels, FFT // 2 + 1) that interpolate log-mel bands to the bins of the vocoder's spectra."""
    filters_KM = mel.filters
    device = filters_KM.device
    at_K = torch.linspace(0, filters_KM.shape[0] - 1, FFT // 2 + 1, device=device).round().long()
    peak_M = filters_KM.argmax(0)  # the bin of each band's peak
    closest_K1 = (at_K[:, None] - peak_M[None]).abs().argmin(1, keepdim=True)
    outside_K1 = filters_KM[at_K].sum(1, keepdim=True) == 0
    is_closest_KM = closest_K1 == torch.arange(filters_KM.shape[1], device=device)
    weights_KM = filters_KM[at_K] + 1e-6 + (outside_K1 & is_closest_KM).float()
    return (weights_KM / weights_KM.sum(1, keepdim=True)).T.contiguous()


def nonnegative_inverse(power_FM: Tensor, filters_KM: Tensor, updates: int = 100) -> Tensor:
    """Returns (F, K) non-negative power spectra whose filtered sums are nearest to (F, M) powers."""
    reached_K = filters_KM.sum(1)
    filtered_FK = power_FM @ filters_KM.T
    spectra_FK = filtered_FK / reached_K.clamp(min=1e-8)
    for _ in range(updates):
        spectra_FK = spectra_FK * filtered_FK / ((spectra_FK @ filters_KM) @ filters_KM.T).clamp(min=1e-20)
    return spectra_FK


@torch.inference_mode()
def griffin_lim(mel: LogMel, mel_FD: Tensor, iterations: int = 32) -> Tensor:
    """Returns audio (T,) for mel frames by Griffin-Lim's iteration (torchaudio), which needs no training.

    Power spectra are the non-negative least-squares inverse of the mel filters by multiplicative updates (Lee and Seung
    2001, eq. 4); the clamped pseudo-inverse is eight times too loud for predicted frames, which are no sums of filters.
    Phases start at zero, so that the result has no random draw.

    Args:
        mel: definition of the frames.
        mel_FD: normalised log-mel frames, (F, n_mels).
        iterations: of the algorithm.
    """
    from torchaudio.functional import griffinlim

    power_FM = (mel_FD.double() * mel.STD + mel.MEAN).exp()
    power_FK = nonnegative_inverse(power_FM, mel.filters.double())
    wave_T = griffinlim(
        power_FK.T.float(), mel.hann, mel.n_fft, mel.hop, mel.window, power=2.0, n_iter=iterations, momentum=0.99,
        length=None, rand_init=False,
    )  # fmt: skip
    return F.pad(wave_T, (mel.window // 2, mel.window // 2))  # its first sample is the centre of the first frame
