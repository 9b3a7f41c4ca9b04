"""Audio of acoustic units: units to mel frames in the voice of a prompt, and an iSTFT vocoder; no recursion.

Each mel frame reads the vectors of its units, of all levels, and convolutions smooth over their neighbours, as
vocoders of discrete units do (arXiv 2104.00355). There is no adversarial loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.models import Memory
from pretrain.models.synthesis.blocks import masked
from pretrain.models.synthesis.mel_convention import MelConvention
from pretrain.models.synthesis.spectral_loss import SpectralLoss
from pretrain.models.synthesis.style import Style
from pretrain.models.synthesis.vocoder import ConvNeXtBlock, ISTFTVocoder, VocoderConfig
from pretrain.models.synthesis.waveform_loss import LEAST_FRAMES, waveform_loss
from pretrain.nn.numerics import full_precision, pad_audio
from pretrain.nn.spectral import LogMel


@config
class UnitAudioConfig:
    """Sizes of what makes audio of units."""

    n_mels: Annotated[int, about("mel bands", ge=8, le=256)] = 80
    dim: Annotated[int, about("channels of a unit's vector", ge=1)] = 256
    layers: Annotated[int, about("ConvNeXt blocks from units to mel frames", ge=1)] = 4
    inner: Annotated[int, about("channels inside of each block", ge=1)] = 768
    style_dim: Annotated[int, about("channels of the voice that is taken from a prompt", ge=1)] = 16
    vocoder_frames: Annotated[
        int, about("mel frames of each segment that the vocoder learns from", ge=LEAST_FRAMES)
    ] = 64
    vocoder: Annotated[VocoderConfig, about("the iSTFT vocoder")] = dataclasses.field(default_factory=VocoderConfig)


class UnitAudio(nn.Module):
    """Mel frames and audio of frame labels.

    Args:
        config: sizes.
        levels: number of code levels.
        units: number of different units of each level.
        rate_hz: frame labels per second.
        prompt_dim: channels of a prompt's frames.
    """

    def __init__(self, config: UnitAudioConfig, *, levels: int, units: int, rate_hz: float, prompt_dim: int) -> None:
        super().__init__()
        self.config, self.units, self.rate_hz = config, units, rate_hz
        self.mel = LogMel(config.n_mels, normalize="fixed")
        self.vectors = nn.Embedding(levels * units, config.dim)
        self.style = Style(prompt_dim, config.style_dim, config.dim)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.inner, 1 / config.layers) for _ in range(config.layers)
        )
        self.norm, self.out = nn.LayerNorm(config.dim), nn.Linear(config.dim, config.n_mels)
        self.vocoder = ISTFTVocoder(config.vocoder, self.mel)
        self.distance = SpectralLoss(self.mel)
        self._convention = MelConvention(self.mel)
        self.register_buffer("mel_sha256", self._convention.checksum())
        self.mel_sha256: Tensor

    def require_same_mel(self) -> None:
        """Compares the definition of the mel frames with that of the checkpoint. Raises ConfigError if they differ."""
        self._convention.require(self.mel_sha256, self.config.n_mels)

    def forward(self, levels: Sequence[Tensor], prompt: Memory, frames: int) -> tuple[Tensor, Tensor]:
        """Returns normalised log-mel frames, (B, frames, n_mels), and which of them have units, (B, frames) bool.

        Args:
            levels: frame labels of each level, (B, F) int64, -1 where there are none.
            prompt: frames of the encoder for the voice; rows of length 0 have the learned voice.
            frames: number of mel frames of the result.
        """
        vectors_BFD, known_BF = self._vectors(levels, frames)
        style_BD = self.style(Frames(prompt.x_BMD, prompt.lengths_B, 1.0), prompt.valid_BM().any(1))
        x_BFD = masked(vectors_BFD + style_BD[:, None], known_BF)
        for block in self.blocks:
            x_BFD = block(x_BFD, known_BF)
        return masked(self.out(self.norm(x_BFD)).float(), known_BF), known_BF

    def losses(
        self, levels: Sequence[Tensor], prompt: Memory, wave_BT: Tensor, lengths_B: Tensor, places_B2: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the losses of each row, (B,) each: L1 of mel frames, and the spectral distance of audio.

        Args:
            levels, prompt: as in `forward`.
            wave_BT: recordings at 16 kHz.
            lengths_B: samples of each row, on the host; rows of length 0 have losses of 0.
            places_B2: in 0 … 1: where the part of the vocoder lies, and, below 0.5, that it reads the recording's mel
                frames instead of predicted ones; None: the whole row, predicted.
        """
        wave_BT = pad_audio(wave_BT, self.mel.window)
        device = wave_BT.device
        mel: Frames = self.mel(wave_BT, lengths_B)
        mel = mel._replace(lengths_B=mel.lengths_B.to(device))
        predicted_BFD, known_BF = self(levels, prompt, mel.x_BFD.shape[1])
        counted_BF = known_BF & mel.valid_BF()
        with full_precision(device):
            errors_BF = (predicted_BFD - mel.x_BFD).abs().mean(2).masked_fill(~counted_BF, 0.0)
            mel_loss_B = errors_BF.sum(1) / counted_BF.sum(1).clamp(min=1)
        mel = mel._replace(lengths_B=counted_BF.sum(1))
        first_B, source_BFD, width = torch.zeros_like(mel.lengths_B), predicted_BFD, predicted_BFD.shape[1]
        if places_B2 is not None:
            width = self.config.vocoder_frames
            places_B, kind_B = places_B2.to(device).unbind(1)
            first_B = (places_B * ((mel.lengths_B - width).clamp(min=0) + 1)).long()
            source_BFD = torch.where((kind_B < 0.5)[:, None, None], mel.x_BFD, predicted_BFD)
        width = max(width, LEAST_FRAMES)
        wave_loss_B, _ = waveform_loss(self.vocoder, self.distance, wave_BT, mel, source_BFD, first_B, width)
        return {"mel": mel_loss_B, "waveform": wave_loss_B}

    def _vectors(self, levels: Sequence[Tensor], frames: int) -> tuple[Tensor, Tensor]:
        """Returns the sum of units' vectors at each mel frame, and which frames have units."""
        device = self.vectors.weight.device
        index_F = (torch.arange(frames, device=device) * (self.rate_hz / self.mel.rate_hz)).floor().long()
        index_F = index_F.clamp(max=levels[0].shape[1])
        labels_BFL = torch.stack([F.pad(labels_BF, (0, 1), value=-1)[:, index_F] for labels_BF in levels], 2)
        known_BF = (labels_BFL >= 0).all(2)
        first_L = torch.arange(len(levels), device=device) * self.units
        vectors_BFLD: Tensor = self.vectors(labels_BFL.clamp(min=0) + first_L)
        return masked(vectors_BFLD.sum(2), known_BF), known_BF
