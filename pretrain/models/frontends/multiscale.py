"""Three views of the audio at one rate: short windows, long windows, and the waveform itself, mixed by a gate.

MFCC are a linear map of log-mel of the same window, so the cepstral branch has a longer one: 64 ms instead of 25 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.interfaces.configs import FrontendConfig
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.models import ChannelGroup, Frontend
from pretrain.interfaces.streaming import FrontendState, Obstacle, SampleWindow, StreamingFrontend
from pretrain.nn.channel_gates import GatedLayerNorm, gate_of, gated, refuse_widths
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.numerics import pad_audio, stack_frames, zero_padding
from pretrain.nn.packing import Packing, packed_strided
from pretrain.nn.spectral import LogMel, Normalize, TorchaudioMfcc, utterance_statistics

WAVE_LAYERS = ((10, 5), (8, 4), (4, 2), (4, 4))
"""Taps and stride of the waveform branch: one frame per 160 samples."""
SLOPES = 4
"""Frames on either side that the slopes of slopes depend on."""
BRANCHES = ("mel", "mfcc", "wave")


@config
class Config(FrontendConfig):
    name: Literal["multiscale"] = "multiscale"
    n_mels: Annotated[int, about("mel bands of the 25 ms branch", ge=1, le=256)] = 80
    mfcc_window: Annotated[int, about("samples per window of the cepstral branch", gt=400)] = 1024
    wave_channels: Annotated[int, about("channels of the waveform branch", ge=1)] = 128
    wave_widths: Annotated[
        tuple[int, ...],
        about("channels of each convolution of the waveform branch but the last; empty: wave_channels in all"),
    ] = ()
    normalize: Annotated[Normalize, about("statistics of each utterance, or fixed ones (needed to stream)")] = (
        "utterance"
    )
    subsampling: Annotated[Literal[2, 4, 8], about("10 ms features per encoder frame")] = 4
    dropout: Annotated[float, about("dropout on the mixed frames", ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        refuse_widths("wave_widths", self.wave_widths, len(WAVE_LAYERS) - 1, "the waveform branch before its last one")


class WaveBranch(nn.Module):
    """Strided convolutions with a layer norm after each, (B, T) to (B, F, channels) at 100 Hz.

    Args:
        widths: channels of each convolution.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = widths
        self.convs = nn.ModuleList(
            TimeConv(into, width, kernel, stride)
            for into, width, (kernel, stride) in zip([1, *widths[:-1]], widths, WAVE_LAYERS, strict=True)
        )
        self.norms = nn.ModuleList(map(GatedLayerNorm, widths))

    def forward(self, wave_BT: Tensor, gates: tuple[Tensor, ...] = ()) -> Tensor:
        """Convolves audio.

        Args:
            wave_BT: (B, T) samples.
            gates: factors of the channels of each convolution but the last; empty: all are 1.
        """
        x_BFD = wave_BT[:, :, None]
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            gate_C = gate_of(gates[number:], 0)
            x_BFD = gated(F.gelu(norm(conv(x_BFD), gate_C)), gate_C)
        return x_BFD

    def channel_groups(self, prefix: str) -> tuple[ChannelGroup, ...]:
        """Returns the channels between convolutions; names of parameters begin with `prefix`."""
        return tuple(
            ChannelGroup(
                width,
                tuple(f"{prefix}{part}.{at}.{kind}" for part in ("convs", "norms") for kind in ("weight", "bias")),
                (f"{prefix}convs.{at + 1}.weight",),
            )
            for at, width in enumerate(self.widths[:-1])
        )


class Multiscale(Frontend, StreamingFrontend):
    """Concatenates three branches at 100 Hz as features; `project` norms, stacks, projects and mixes them.

    The gate is a softmax over branches for each frame, from all branches' features; `watched` gives its means.
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.subsampling = config.subsampling
        self.mel = LogMel(config.n_mels, normalize=config.normalize)
        self.mfcc = TorchaudioMfcc(40, config.mfcc_window, config.normalize)
        between = config.wave_widths or (config.wave_channels,) * (len(WAVE_LAYERS) - 1)
        self.wave = WaveBranch((*between, config.wave_channels))
        self.reach = (config.mfcc_window - self.mel.window) // 2
        self.widths = [config.n_mels, self.mfcc.dim, config.wave_channels]
        self.feature_dim = sum(self.widths)
        self.feature_rate_hz, self.rate_hz = self.mel.rate_hz, self.mel.rate_hz / config.subsampling
        stacked = [width * config.subsampling for width in self.widths]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in stacked)
        self.linears = nn.ModuleList(nn.Linear(width, dim) for width in stacked)
        self.gate = nn.Linear(sum(stacked), len(BRANCHES))
        self.dropout = Dropout(config.dropout)
        self.register_buffer("gate_means", torch.full((len(BRANCHES),), 1 / len(BRANCHES)), persistent=False)
        self.gate_means: Tensor
        self.shortest = self.least_samples()

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        return self.wave.channel_groups("wave.")

    def narrowed(self, sizes: Sequence[int]) -> dict[str, object]:
        return {"wave_widths": list(sizes)}

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        return self.mel.lengths(lengths_B)

    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        return self.mel.lengths(lengths_B) // self.subsampling

    def extract(self, wave_BT: Tensor, lengths_B: Tensor, gates: tuple[Tensor, ...] = ()) -> Frames:
        wave_BT = pad_audio(wave_BT, self.shortest)
        mel: Frames = self.mel(wave_BT, lengths_B)
        n_frames = mel.x_BFD.shape[1]
        # the long window is centred on the short one, with silence around the audio
        around = F.pad(wave_BT, (self.reach, self.reach))
        mfcc: Frames = self.mfcc(around, lengths_B + 2 * self.reach)
        if self.packed:
            packing = Packing.of(mel.lengths_B, n_frames, wave_BT.device)
            wave = functools.partial(self.wave, gates=gates)
            row_1ND = packed_strided(wave, wave_BT, lengths_B, packing.lengths, self.mel.hop)
            wave_BFD = packing.unpack(row_1ND)
        else:
            # enough zeros after it that a short row gives the same in a long batch as alone
            wave_BFD = self.wave(F.pad(wave_BT, (0, 2 * self.mel.window)), gates)
        return self.joined(mel, mfcc.x_BFD[:, :n_frames], wave_BFD[:, :n_frames])

    def joined(self, mel: Frames, mfcc_BFD: Tensor, wave_BFD: Tensor) -> Frames:
        """Concatenates the channels of the branches, zero beyond each length."""
        x_BFD = torch.cat([part.to(wave_BFD.dtype) for part in (mel.x_BFD, mfcc_BFD, wave_BFD)], dim=2)
        return Frames(zero_padding(x_BFD, mel.lengths_B), mel.lengths_B, mel.rate_hz)

    def project(self, features: Frames, gates: tuple[Tensor, ...] = ()) -> Frames:
        branches = [
            stack_frames(features._replace(x_BFD=x_BFD), self.subsampling).x_BFD
            for x_BFD in features.x_BFD.split(self.widths, dim=2)  # type: ignore[no-untyped-call]
        ]
        normed = [norm(branch) for norm, branch in zip(self.norms, branches, strict=True)]
        gate_BFK = self.gate(torch.cat(normed, dim=2)).softmax(dim=-1)
        projected = torch.stack([linear(branch) for linear, branch in zip(self.linears, normed, strict=True)], dim=3)
        lengths_B = features.lengths_B // self.subsampling
        frames = Frames((projected * gate_BFK[:, :, None]).sum(3), lengths_B, self.rate_hz)
        total_K = (gate_BFK.detach().float() * frames.valid_BF()[:, :, None]).sum((0, 1))
        self.gate_means.copy_(total_K / lengths_B.sum().clamp(min=1))
        return frames._replace(x_BFD=zero_padding(self.dropout(frames.x_BFD), lengths_B))

    def obstacles(self) -> list[Obstacle]:
        return utterance_statistics(self.mel.normalize)

    def sample_window(self) -> SampleWindow:
        hop = self.mel.hop
        after = hop * (self.subsampling - 1 + SLOPES) + self.mel.window + self.reach
        return SampleWindow(hop * self.subsampling, hop * SLOPES + self.reach, after)

    def start(self, rows: int) -> FrontendState:
        """Returns an empty state: the window of samples has all that a frame depends on."""
        return ()

    def step(
        self, wave_BT: Tensor, samples_B: Tensor, frames_B: Tensor, state: FrontendState
    ) -> tuple[Frames, FrontendState]:
        window = self.sample_window()
        n_frames = ((wave_BT.shape[1] - window.before - window.after) // window.hop + 1) * self.subsampling
        chunk_BT, heard_B = wave_BT[:, window.before :], samples_B - window.before
        lengths_B = self.mel.lengths(heard_B)
        mel: Frames = self.mel(chunk_BT[:, : self.mel.hop * (n_frames - 1) + self.mel.window], heard_B)
        first_B = (SLOPES - frames_B * self.subsampling).clamp(min=0)
        mfcc = self.mfcc.between(wave_BT, first_B, (lengths_B + SLOPES).clamp(max=n_frames + 2 * SLOPES))
        mel = mel._replace(lengths_B=lengths_B.clamp(max=n_frames))
        mfcc_BFD, wave_BFD = mfcc.x_BFD[:, SLOPES : SLOPES + n_frames], self.wave(chunk_BT)[:, :n_frames]
        return self.project(self.joined(mel, mfcc_BFD, wave_BFD)), ()

    def watched(self) -> dict[str, Tensor]:
        return {f"health/gate_{name}": self.gate_means[branch] for branch, name in enumerate(BRANCHES)}


def build(config: Config, dim: int) -> Multiscale:
    return Multiscale(config, dim)
