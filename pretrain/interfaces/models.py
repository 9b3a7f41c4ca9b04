"""Interfaces of the parts of a speech model: front end, encoder, and their composition."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext


class Frontend(nn.Module, abc.ABC):
    """Waveform to frames in two stages: `extract` gives features, `project` brings them to the encoder."""

    couples: frozenset[str] = frozenset()
    """Contract checks that cannot hold by design with this config: "padding", "batch"."""
    packed: bool = False
    """Run convolutions on utterances end to end, without padding; what comes in and goes out stays the same."""
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float

    def watched(self) -> dict[str, Tensor]:
        """Scalars of the last forward pass that are worth a curve, by name. Default: none."""
        return {}

    @abc.abstractmethod
    def extract(self, wave_BT: Tensor, lengths_B: Tensor) -> Frames:
        """(B, T) audio to (B, F', feature_dim) at feature_rate_hz; zero beyond each length."""

    @abc.abstractmethod
    def project(self, features: Frames) -> Frames:
        """(B, F', feature_dim) to (B, F, dim) at rate_hz; zero beyond each length."""

    @abc.abstractmethod
    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Samples to valid feature frames."""

    @abc.abstractmethod
    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        """Samples to valid encoder frames."""

    def least_samples(self, frames: int = 1) -> int:
        """Returns the shortest audio, in samples, that gives at least `frames` encoder frames.

        Found from `frame_lengths`, which never falls as the audio grows, so that the two cannot disagree.
        """
        shortest, enough = 0, 1
        while int(self.frame_lengths(torch.tensor([enough]))) < frames:
            shortest, enough = enough, 2 * enough
        while enough - shortest > 1:
            middle = (shortest + enough) // 2
            if int(self.frame_lengths(torch.tensor([middle]))) < frames:
                shortest = middle
            else:
                enough = middle
        return enough


class Encoder(nn.Module, abc.ABC):
    """Frames in, all layers out."""

    couples: frozenset[str] = frozenset()
    dim: int
    n_layers: int
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute each block, or only its cheap parts, in the backward pass; dropout draws the same again."""
    packed: bool = False
    """Compute on utterances end to end in one row, without padding; what comes in and goes out stays (B, F, D)."""
    keep_ffn: bool = False
    """Fill `EncoderOutput.ffn_layers`."""
    stop_after: int | None = None
    """Run only so many blocks; the output then ends with that layer."""

    @abc.abstractmethod
    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        """`ctx` keys layer drop in training; None draws nothing."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an objective or head must know of the model before it exists."""

    dim: int
    n_layers: int
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float


class SpeechModel(nn.Module):
    """frontend + encoder: what pretraining leaves behind."""

    def __init__(self, frontend: Frontend, encoder: Encoder) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder

    @property
    def shape(self) -> ModelShape:
        f, e = self.frontend, self.encoder
        return ModelShape(e.dim, e.n_layers, f.feature_dim, f.feature_rate_hz, f.rate_hz)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> EncoderOutput:
        """Unmasked encoding, as used after pretraining."""
        out: EncoderOutput = self.encoder(self.frontend.project(self.frontend.extract(wave_BT, lengths_B)))
        return out
