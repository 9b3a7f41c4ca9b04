"""Synthesiser: tokens to mel frames in one pass (FastSpeech 2, arXiv 2006.04558), with durations learned inside."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config, refuse
from pretrain.interfaces.frames import Frames
from pretrain.models.synthesis.aligner import Aligner, best_durations
from pretrain.models.synthesis.blocks import FeedForwardTransformer, masked
from pretrain.models.synthesis.flow import FlowConfig, FlowDecoder, FlowDraws
from pretrain.models.synthesis.variance import VariancePredictor, filled, regulate, token_means
from pretrain.models.synthesis.vocoder import ISTFTVocoder, VocoderConfig
from pretrain.nn.convolution import TimeConv
from pretrain.nn.spectral import LogMel

LONGEST_TOKEN = 200
"""Frames of a token at most (2 s), against a duration that was predicted wrongly."""


@config
class SynthesizerConfig:
    """Sizes of a synthesiser; the defaults are FastSpeech 2's."""

    dim: Annotated[int, about("channels of the text tower and the mel decoder", ge=2)] = 256
    layers: Annotated[int, about("blocks of the text tower", ge=1)] = 4
    decoder_layers: Annotated[int, about("blocks of the mel decoder", ge=1)] = 4
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 2
    ffn_dim: Annotated[int, about("channels between the two convolutions of a block", ge=1)] = 1024
    kernel: Annotated[int, about("width of a block's first convolution, odd", ge=1)] = 9
    dropout: Annotated[float, about("dropout of embeddings and residual sums", ge=0, lt=1)] = 0.1
    predictor_dim: Annotated[int, about("channels of the predictors of duration, pitch and energy", ge=1)] = 256
    predictor_dropout: Annotated[float, about("their dropout", ge=0, lt=1)] = 0.5
    decoder: Annotated[
        Literal["l1", "flow"],
        about("mel frames: l1, their median, in one pass; flow, drawn by flow matching in a few steps around it"),
    ] = "l1"
    flow: Annotated[FlowConfig, about("sizes for decoder=flow")] = dataclasses.field(default_factory=FlowConfig)
    aligner_dim: Annotated[int, about("inner channels of the aligner", ge=1)] = 256
    vocoder: Annotated[VocoderConfig | None, about("the iSTFT vocoder; null: mel frames alone are learned")] = (
        dataclasses.field(default_factory=VocoderConfig)
    )

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            refuse("heads", self.heads, f"must divide dim={self.dim}")
        if self.kernel % 2 == 0:
            refuse("kernel", self.kernel, "must be odd")
        if self.decoder == "flow" and self.dim % 2:
            refuse("dim", self.dim, "must be even for decoder=flow")


class Recorded(NamedTuple):
    """Holds the targets that training takes from a recording.

    mel: normalised log-mel frames.  pitch_BF: octaves above a fixed frequency, 0 without a voice; voiced_BF: bool.
    draws: for decoder=flow.
    """

    mel: Frames
    pitch_BF: Tensor | None = None
    voiced_BF: Tensor | None = None
    draws: FlowDraws | None = None


class TokenValues(NamedTuple):
    """A predicted value of each token, its target, both (B, N), and the tokens with a target, (B, N) bool."""

    predicted_BN: Tensor
    target_BN: Tensor
    known_BN: Tensor


class SynthesisOutput(NamedTuple):
    """Result of training's pass.

    mel_BFD: predicted frames, on the recording's time.  alignment_BFN: ln p(frame | token).  durations_BN: frames of
    each token on the best path.  duration, pitch, energy: of the predictors, durations as ln(1 + frames).
    flow_B: loss of decoder=flow.
    """

    mel_BFD: Tensor
    alignment_BFN: Tensor
    durations_BN: Tensor
    duration: TokenValues
    pitch: TokenValues | None
    energy: TokenValues
    flow_B: Tensor | None = None


class Planned(NamedTuple):
    """Tokens before they become frames.  x_BND: vectors.  durations_BN: frames of each, int64, 0 for padding."""

    x_BND: Tensor
    durations_BN: Tensor


class Controls(NamedTuple):
    """speed: 1 as learned, 2 twice as fast.  pitch: semitones up.  energy: decibels up."""

    speed: float = 1.0
    pitch: float = 0.0
    energy: float = 0.0


AS_LEARNED = Controls()


class Drawing(NamedTuple):
    """How decoder=flow draws mel frames.  steps: of Euler's method.  temperature: deviation of the noise."""

    steps: int = 10
    temperature: float = 1.0
    seed: int = 0


AS_DRAWN = Drawing()


DECIBEL = 0.2302585 / LogMel.STD
"""A decibel of power in normalised log-mel."""


class Synthesizer(nn.Module):
    """Text tower, aligner, predictors of duration, pitch and energy, mel decoder, and an iSTFT vocoder.

    Tokens are 0 … tokens − 1. Pitch is in octaves, energy is the mean of a frame's normalised log-mel bands.

    Args:
        config: sizes.
        tokens: number of different tokens.
        mel: definition of the mel frames.
        pitch: whether there is a predictor of pitch.
    """

    def __init__(self, config: SynthesizerConfig, tokens: int, mel: LogMel, pitch: bool) -> None:
        super().__init__()
        dim = config.dim

        def tower(blocks: int) -> FeedForwardTransformer:
            return FeedForwardTransformer(
                blocks,
                dim=dim,
                heads=config.heads,
                ffn_dim=config.ffn_dim,
                kernel=config.kernel,
                dropout=config.dropout,
            )

        def predictor() -> VariancePredictor:
            return VariancePredictor(dim, config.predictor_dim, 3, config.predictor_dropout)

        self.embedding = nn.Embedding(tokens, dim)
        self.tower, self.decoder = tower(config.layers), tower(config.decoder_layers)
        self.aligner = Aligner(dim, mel.dim, config.aligner_dim)
        self.duration, self.energy = predictor(), predictor()
        self.pitch = predictor() if pitch else None
        self.embed_energy = TimeConv(1, dim, 3, padding=1)
        self.embed_pitch = TimeConv(1, dim, 3, padding=1) if pitch else None
        self.out = nn.Linear(dim, mel.dim)
        self.flow = FlowDecoder(config.flow, dim, mel.dim) if config.decoder == "flow" else None
        self.vocoder = ISTFTVocoder(config.vocoder, mel) if config.vocoder is not None else None

    def forward(self, tokens_BN: Tensor, tokens_B: Tensor, style_BD: Tensor, recorded: Recorded) -> SynthesisOutput:
        """Predicts the mel frames of recordings, on their time, from tokens and the recordings' pitch and energy.

        Args:
            tokens_BN: ids, int64; any id beyond each row's tokens.
            tokens_B: tokens of each row, int64; at most its frames, and at least 1 where it has frames.
            style_BD: added to each token, (B, dim).
            recorded: the recordings.
        """
        mel_BFD, frames_B = recorded.mel.x_BFD, recorded.mel.lengths_B
        valid_BN, valid_BF = _inside(tokens_B, tokens_BN.shape[1]), recorded.mel.valid_BF()
        embedded_BND = masked(self.embedding(tokens_BN), valid_BN)
        alignment_BFN = self.aligner(embedded_BND, mel_BFD, tokens_B, frames_B)
        durations_BN = best_durations(alignment_BFN, tokens_B, frames_B)
        x_BND = masked(self.tower(embedded_BND, valid_BN) + style_BD[:, None], valid_BN)
        duration = TokenValues(self.duration(x_BND, valid_BN), torch.log1p(durations_BN.float()), valid_BN)
        energy_BN, _ = token_means(mel_BFD.mean(2), valid_BF, durations_BN)
        energy = TokenValues(self.energy(x_BND, valid_BN), energy_BN, valid_BN)
        pitch, pitch_BN = None, None
        if self.pitch is not None:
            assert recorded.pitch_BF is not None
            assert recorded.voiced_BF is not None
            mean_BN, voiced_BN = token_means(recorded.pitch_BF, recorded.voiced_BF & valid_BF, durations_BN)
            pitch_BN = filled(mean_BN, voiced_BN).masked_fill(~valid_BN, 0.0)
            pitch = TokenValues(self.pitch(x_BND, valid_BN), pitch_BN, voiced_BN & valid_BN)
        x_BND = self._with_values(x_BND, valid_BN, energy_BN, pitch_BN)
        text_BFD = self.decoder(regulate(x_BND, durations_BN, mel_BFD.shape[1]), valid_BF)
        median_BFD = masked(self.out(text_BFD).float(), valid_BF)
        flow_B = None
        if self.flow is not None:
            assert recorded.draws is not None
            flow_B = self.flow.loss(recorded.draws, mel_BFD, text_BFD, median_BFD.detach(), valid_BF)
        return SynthesisOutput(
            median_BFD,
            alignment_BFN=alignment_BFN,
            durations_BN=durations_BN,
            duration=duration,
            pitch=pitch,
            energy=energy,
            flow_B=flow_B,
        )

    def speak(
        self,
        tokens_BN: Tensor,
        tokens_B: Tensor,
        style_BD: Tensor,
        controls: Controls,
        drawing: Drawing = AS_DRAWN,
    ) -> Frames:
        """Returns normalised log-mel frames of texts, zero beyond each row's.

        Args:
            tokens_BN: ids, int64; any id beyond each row's tokens.
            tokens_B: tokens of each row, int64, at least 1.
            style_BD: added to each token, (B, dim).
            controls: changes of speed, pitch and energy.
            drawing: for decoder=flow.
        """
        planned = self.plan(tokens_BN, tokens_B, style_BD, torch.tensor(controls, device=tokens_BN.device))
        frames = int(planned.durations_BN.sum(1).max())
        median, text_BFD = self._rendered(planned, frames)
        if self.flow is None:
            return median
        valid_BF, rng = median.valid_BF(), keyed_rng(drawing.seed, "flow")
        noise = rng.standard_normal((frames, median.x_BFD.shape[2]), np.float32) * drawing.temperature
        noise_BFM = torch.from_numpy(noise).to(median.x_BFD.device).expand_as(median.x_BFD)
        mel_BFM = self.flow.speak(noise_BFM, text_BFD, median.x_BFD, valid_BF, drawing.steps)
        return median._replace(x_BFD=mel_BFM)

    def plan(self, tokens_BN: Tensor, tokens_B: Tensor, style_BD: Tensor, controls_3: Tensor) -> Planned:
        """Returns durations and vectors of texts' tokens; arguments as of `speak`, with `Controls` as (3,) fp32."""
        speed, semitones, decibels = controls_3.unbind()
        valid_BN = _inside(tokens_B, tokens_BN.shape[1])
        x_BND = self.tower(masked(self.embedding(tokens_BN), valid_BN), valid_BN)
        x_BND = masked(x_BND + style_BD[:, None], valid_BN)
        durations_BN = frames_of(self.duration(x_BND, valid_BN), valid_BN, speed)
        energy_BN = self.energy(x_BND, valid_BN) + decibels * DECIBEL
        pitch_BN = None if self.pitch is None else self.pitch(x_BND, valid_BN) + semitones / 12
        return Planned(self._with_values(x_BND, valid_BN, energy_BN, pitch_BN), durations_BN)

    def render(self, planned: Planned, frames: int) -> Frames:
        """Returns the median of normalised log-mel frames, (B, frames, n_mels), of what `plan` returned."""
        return self._rendered(planned, frames)[0]

    def _rendered(self, planned: Planned, frames: int) -> tuple[Frames, Tensor]:
        """Returns the median of mel frames, and the text's frames that they are made of."""
        frames_B = planned.durations_BN.sum(1)
        valid_BF = _inside(frames_B, frames)
        text_BFD: Tensor = self.decoder(regulate(planned.x_BND, planned.durations_BN, frames), valid_BF)
        mel_BFD = masked(self.out(text_BFD).float(), valid_BF)
        return Frames(mel_BFD, frames_B, 100.0), text_BFD

    def _with_values(self, x_BND: Tensor, valid_BN: Tensor, energy_BN: Tensor, pitch_BN: Tensor | None) -> Tensor:
        x_BND = x_BND + self.embed_energy(energy_BN.masked_fill(~valid_BN, 0.0)[:, :, None])
        if self.embed_pitch is not None:
            assert pitch_BN is not None
            x_BND = x_BND + self.embed_pitch(pitch_BN.masked_fill(~valid_BN, 0.0)[:, :, None])
        return masked(x_BND, valid_BN)


def frames_of(log_BN: Tensor, valid_BN: Tensor, speed: Tensor | float) -> Tensor:
    """Returns whole frames of each token, (B, N) int64, from predicted ln(1 + frames); 1 to `LONGEST_TOKEN`.

    The ends of tokens are rounded, not their durations, so that the rate of speech is kept.
    """
    exact_BN = log_BN.double().clamp(max=12.0).expm1().clamp(1.0, LONGEST_TOKEN) / speed
    ends_BN = exact_BN.masked_fill(~valid_BN, 0.0).cumsum(1).round().long()
    durations_BN = ends_BN.diff(dim=1, prepend=ends_BN.new_zeros(len(ends_BN), 1))
    return durations_BN.clamp(min=1).masked_fill(~valid_BN, 0)


def _inside(counts_B: Tensor, width: int) -> Tensor:
    """Returns (B, width) bool, True before each row's count."""
    return torch.arange(width, device=counts_B.device) < counts_B[:, None]
