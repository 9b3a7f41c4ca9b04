"""Log-mel features and strided convolutions: 50, 25 or 12.5 frames per second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.interfaces.configs import FrontendConfig
from pretrain.interfaces.frames import Frames, valid_frames
from pretrain.interfaces.models import ChannelGroup, Frontend
from pretrain.interfaces.streaming import FrontendState, Obstacle, SampleWindow, StreamingFrontend
from pretrain.nn.channel_gates import GatedLayerNorm, conv_groups, gate_of, gated, refuse_widths
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.kaldi_mel import KaldiMel
from pretrain.nn.numerics import first_frames, pad_audio, zero_padding
from pretrain.nn.packing import Packing, TimeGrid
from pretrain.nn.spectral import LogMel, Normalize, utterance_statistics


@config
class Config(FrontendConfig):
    name: Literal["log_mel"] = "log_mel"
    n_mels: Annotated[int, about("mel bands", ge=1, le=256)] = 80
    window: Annotated[int, about("samples per analysis window at 16 kHz", ge=64)] = 400
    hop: Annotated[int, about("samples between windows", ge=16)] = 160
    mel: Annotated[
        Literal["plain", "kaldi"],
        about("plain: HTK's mel scale and a Hann window; kaldi: as devices compute it (auricle export --to wenet)"),
    ] = "plain"
    normalize: Annotated[Normalize, about("statistics of each utterance, or fixed ones (needed to stream)")] = (
        "utterance"
    )
    subsampling: Annotated[Literal[1, 2, 4, 8], about("windows per encoder frame")] = 4
    widths: Annotated[
        tuple[int, ...], about("channels of each convolution, log2(subsampling) numbers; empty: encoder.dim")
    ] = ()
    dropout: Annotated[float, about("dropout on the projected frames", ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        refuse_widths("widths", self.widths, self.n_convs, f"frontend.subsampling={self.subsampling}")

    @property
    def n_convs(self) -> int:
        """Number of convolutions, each of stride 2."""
        return self.subsampling.bit_length() - 1


class LogMelFrontend(Frontend, StreamingFrontend):
    """Log-mel features, log2(subsampling) convolutions of stride 2, layer norm and a linear layer."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        kind = KaldiMel if config.mel == "kaldi" else LogMel
        self.mel = kind(config.n_mels, config.window, config.hop, config.normalize)
        self.subsampling = config.subsampling
        self.feature_dim = config.n_mels
        self.feature_rate_hz = self.mel.rate_hz
        self.rate_hz = self.mel.rate_hz / config.subsampling
        widths = [config.n_mels, *(config.widths or (dim,) * config.n_convs)]
        self.conv_inputs, self.widths = widths[:-1], widths[1:]
        self.convs = nn.ModuleList(
            TimeConv(into, width, kernel=3, stride=2, padding=1) for into, width in itertools.pairwise(widths)
        )
        self.norm = GatedLayerNorm(widths[-1])
        self.linear = nn.Linear(widths[-1], dim)
        self.dropout = Dropout(config.dropout)
        self.shortest = self.least_samples()

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        return conv_groups(
            self.widths,
            rows=[(f"convs.{number}.weight", f"convs.{number}.bias") for number in range(len(self.convs))],
            columns=[f"convs.{number}.weight" for number in range(1, len(self.convs))],
        )

    def narrowed(self, sizes: Sequence[int]) -> dict[str, object]:
        return {"widths": list(sizes)}

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        return self.mel.lengths(lengths_B)

    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        return self.mel.lengths(lengths_B) // self.subsampling

    def extract(self, wave_BT: Tensor, lengths_B: Tensor, gates: tuple[Tensor, ...] = ()) -> Frames:
        frames: Frames = self.mel(pad_audio(wave_BT, self.shortest), lengths_B)
        return frames

    def project(self, features: Frames, gates: tuple[Tensor, ...] = ()) -> Frames:
        lengths_B = features.lengths_B // self.subsampling
        kept = features.x_BFD.shape[1] // self.subsampling * self.subsampling
        valid_B, x_BFD = lengths_B * self.subsampling, first_frames(features.x_BFD, kept)
        if not self.packed:
            inside_BF = valid_frames(valid_B, kept, x_BFD.device)
            x_BFD = self.projected(self.convolve(x_BFD, inside_BF[:, :, None], gates), gates)
            return Frames(zero_padding(x_BFD, lengths_B), lengths_B, self.rate_hz)
        fine, coarse = (
            Packing.of(lengths, width, x_BFD.device)
            for lengths, width in ((valid_B, kept), (lengths_B, kept // self.subsampling))
        )
        # a whole stride of zeros, so that convolutions in a row keep one between utterances
        grid = TimeGrid.spaced(fine.lengths, self.subsampling, x_BFD.device, multiple=self.subsampling)
        assert grid.inside_RW1 is not None
        row_1WD = self.convolve(grid.spread(fine.pack(x_BFD)), grid.inside_RW1, gates)
        row_1ND = row_1WD.index_select(1, TimeGrid.spaced(coarse.lengths, 1, x_BFD.device).index_M)
        return Frames(coarse.unpack(self.projected(row_1ND, gates)), lengths_B, self.rate_hz)

    def convolve(self, x_BFD: Tensor, inside_BF1: Tensor, gates: tuple[Tensor, ...] = ()) -> Tensor:
        """Runs the strided convolutions on (B, F, D), with zeros outside of utterances before each."""
        for number, conv in enumerate(self.convs):
            if number:
                x_BFD = gated(x_BFD, gate_of(gates, number - 1))
            # a row's last frames must not depend on a longer row beside it, or on the convolution's bias beyond its end
            x_BFD = x_BFD.masked_fill(~inside_BF1, 0.0)
            x_BFD = F.gelu(conv(x_BFD))
            inside_BF1 = inside_BF1[:, ::2]
        return x_BFD

    def projected(self, x_BFD: Tensor, gates: tuple[Tensor, ...] = ()) -> Tensor:
        """Returns the encoder's input, (B, F, dim), of what the last convolution gives."""
        gate_D = gate_of(gates, -1)
        frames_BFD: Tensor = self.dropout(self.linear(gated(self.norm(x_BFD, gate_D), gate_D)))
        return frames_BFD

    def obstacles(self) -> list[Obstacle]:
        return utterance_statistics(self.mel.normalize)

    def sample_window(self) -> SampleWindow:
        return SampleWindow(self.mel.hop * self.subsampling, 0, self.mel.hop * (self.subsampling - 1) + self.mel.window)

    def start(self, rows: int) -> FrontendState:
        """Returns the zeros before the first input frame of each convolution, (B, 1, D)."""
        like = self.linear.weight
        return tuple(like.new_zeros(rows, 1, width) for width in self.conv_inputs)

    def step(
        self, wave_BT: Tensor, samples_B: Tensor, frames_B: Tensor, state: FrontendState
    ) -> tuple[Frames, FrontendState]:
        return self.step_features(self.mel(wave_BT, samples_B).x_BFD, self.frame_lengths(samples_B), state)

    def step_features(self, x_BFD: Tensor, lengths_B: Tensor, state: FrontendState) -> tuple[Frames, FrontendState]:
        """Computes the next frames of each stream from its features.

        Args:
            x_BFD: (B, n · subsampling, n_mels) features of n frames, normalised.
            lengths_B: valid frames of each row, at most n, int64.
            state: from `start` or the previous step.

        Returns:
            (B, n, dim) frames, and the new state.
        """
        tails = []
        for conv, tail_B1D in zip(self.convs, state, strict=True):
            tails.append(x_BFD[:, -1:])
            joined_BFD = torch.cat([tail_B1D, x_BFD], dim=1)
            # a zero frame in front shifts the stride, so that the first output (dropped) does not use the chunk
            x_BFD = F.gelu(conv(F.pad(joined_BFD, (0, 0, 1, 0))))[:, 1:]
        x_BFD = self.linear(self.norm(x_BFD))
        return Frames(zero_padding(x_BFD, lengths_B), lengths_B, self.rate_hz), tuple(tails)


def build(config: Config, dim: int) -> LogMelFrontend:
    return LogMelFrontend(config, dim)
