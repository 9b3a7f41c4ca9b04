"""The convolutional waveform stem of wav2vec 2.0, HuBERT, WavLM and data2vec: 16 kHz audio to 50 frames per second."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.configs import FrontendConfig
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.models import ChannelGroup, Frontend
from pretrain.interfaces.streaming import FrontendState, Obstacle, SampleWindow, StreamingFrontend
from pretrain.nn.channel_gates import GatedLayerNorm, conv_groups, gate_of, gated, refuse_widths
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.numerics import masked_deviation, pad_audio, scale_gradient, without_autocast, zero_padding
from pretrain.nn.packing import Packing, packed_strided
from pretrain.nn.spectral import normalize_wave

Norm = Literal["group", "layer"]


@config
class Config(FrontendConfig):
    name: Literal["waveform_conv"] = "waveform_conv"
    channels: Annotated[int, about("channels of every convolution", ge=1)] = 512
    kernels: Annotated[tuple[int, ...], about("taps of each convolution", min_length=1)] = (10, 3, 3, 3, 3, 2, 2)
    strides: Annotated[tuple[int, ...], about("stride of each convolution", min_length=1)] = (5, 2, 2, 2, 2, 2, 2)
    widths: Annotated[
        tuple[int, ...], about("channels of each convolution, where they differ; empty: frontend.channels in all")
    ] = ()
    norm: Annotated[
        Norm,
        about("group: one group norm over time after the first convolution (BASE); layer: after each one (LARGE)"),
    ] = "group"
    bias: Annotated[bool, about("biases in the convolutions (LARGE)")] = False
    normalize: Annotated[bool, about("bring each utterance to mean 0 and deviation 1 first (LARGE)")] = False
    gradient_scale: Annotated[
        float, about("the gradient that reaches the convolutions, times this (0.1 for wav2vec 2.0 BASE)", ge=0)
    ] = 1.0
    dropout: Annotated[float, about("dropout on the projected frames", ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if len(self.kernels) != len(self.strides):
            refuse("strides", list(self.strides), f"must be as many as frontend.kernels={list(self.kernels)}")
        refuse_widths("widths", self.widths, len(self.kernels), f"frontend.kernels={list(self.kernels)}")

    @property
    def conv_widths(self) -> tuple[int, ...]:
        """Channels of each convolution."""
        return self.widths or (self.channels,) * len(self.kernels)

    @property
    def packable(self) -> bool:
        """Whether utterances can be packed; not with a group norm, whose statistics cover the whole row."""
        return self.norm == "layer"


class NormedConv(nn.Module):
    """The first convolution with its group norm over time (one group per channel) and GELU, (B, T, 1) to (B, F, D).

    A channel with weights w is linear in its input windows, so its mean and variance over time follow from the mean m
    and covariance C of the windows: w·m and w·Cw. The norm is therefore a scale of each row's weights, and the widest
    tensor of the model is neither stored nor read twice.
    """

    eps = 1e-5

    def __init__(self, dim: int, kernel: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel))
        nn.init.kaiming_normal_(self.weight)
        # without effect, since the norm removes it; released models with biases also have one here
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, wave_BT1: Tensor, gate_D: Tensor | None = None) -> Tensor:
        """Returns (B, F, D) frames; channels are normalised one by one, so the gate has no effect here."""
        windows_BFK = wave_BT1[:, :, 0].unfold(1, self.kernel, self.stride)
        with without_autocast(wave_BT1.device):
            exact_BFK, weight_KD = windows_BFK.double(), self.weight[:, 0].T.double()
            mean_B1K = exact_BFK.mean(1, keepdim=True)
            centred_BFK = exact_BFK - mean_B1K
            covariance_BKK = centred_BFK.transpose(1, 2) @ centred_BFK / windows_BFK.shape[1]
            variance_B1D = (weight_KD * (covariance_BKK @ weight_KD)).sum(1, keepdim=True).clamp(min=0)
            scale_B1D = self.norm_weight * (variance_B1D + self.eps).rsqrt()
            bias = 0.0 if self.bias is None else self.bias
            offset_B1D = self.norm_bias + scale_B1D * (bias - (mean_B1K @ weight_KD + bias))
            normed_BKD = (weight_KD * scale_B1D).to(wave_BT1.dtype)
        return F.gelu(torch.baddbmm(offset_B1D.to(wave_BT1.dtype), windows_BFK, normed_BKD))


class ConvLayer(nn.Module):
    """Convolution → layer norm, or none → GELU, on (B, T, D).

    Args:
        in_dim, dim: channels of input and output.
        kernel, stride: in frames of the layer before.
        bias: whether the convolution has one.
        norm: whether a layer norm over channels follows.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.conv = TimeConv(in_dim, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.layer_norm = GatedLayerNorm(dim) if norm else None

    def forward(self, x_BTD: Tensor, gate_D: Tensor | None = None) -> Tensor:
        y_BTD: Tensor = self.conv(x_BTD)
        return F.gelu(y_BTD if self.layer_norm is None else self.layer_norm(y_BTD, gate_D))


class WaveformConv(Frontend, StreamingFrontend):
    """Waveform stem whose features are layer-normed convolution outputs (the input of wav2vec 2.0's quantiser).

    `raw_BFD` is the same before the norm.
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        # the group norm's statistics include padding, as in every released BASE model
        self.couples = frozenset({"padding"}) if config.norm == "group" else frozenset()
        self.group_norm = config.norm == "group"
        self.kernels, self.strides, self.normalize = config.kernels, config.strides, config.normalize
        self.gradient_scale = config.gradient_scale
        self.widths = widths = config.conv_widths
        self.feature_dim = widths[-1]
        self.hop = math.prod(config.strides)
        self.feature_rate_hz = self.rate_hz = SAMPLE_RATE / self.hop
        self.convs = nn.ModuleList()
        for layer, (kernel, stride) in enumerate(zip(config.kernels, config.strides, strict=True)):
            if layer == 0 and config.norm == "group":
                self.convs.append(NormedConv(widths[0], kernel, stride, config.bias))
                continue
            in_dim = widths[layer - 1] if layer else 1
            self.convs.append(
                ConvLayer(
                    in_dim, widths[layer], kernel=kernel, stride=stride, bias=config.bias, norm=config.norm == "layer"
                )
            )
        self.norm = GatedLayerNorm(self.feature_dim)
        self.linear = nn.Linear(self.feature_dim, dim)
        nn.init.uniform_(self.linear.weight, -(self.feature_dim**-0.5), self.feature_dim**-0.5)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("stem_deviation", torch.zeros(()), persistent=False)
        self.stem_deviation: Tensor
        self.shortest = self.least_samples()

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        convs = [self.convs.get_submodule(str(number)) for number in range(len(self.kernels))]
        rows = [
            tuple(f"convs.{number}.{name}" for name, _ in conv.named_parameters()) for number, conv in enumerate(convs)
        ]
        columns = [f"convs.{number}.conv.weight" for number in range(1, len(convs))]
        return conv_groups(self.widths, rows, columns)

    def narrowed(self, sizes: Sequence[int]) -> dict[str, object]:
        return {"widths": list(sizes)}

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            lengths_B = (lengths_B - kernel) // stride + 1
        return lengths_B.clamp(min=0)

    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        return self.feature_lengths(lengths_B)

    def extract(self, wave_BT: Tensor, lengths_B: Tensor, gates: tuple[Tensor, ...] = ()) -> Frames:
        wave_BT = pad_audio(wave_BT, self.shortest)
        if self.normalize:
            wave_BT = normalize_wave(wave_BT, lengths_B)
        frame_lengths_B = self.feature_lengths(lengths_B)
        if self.packed:
            width = int(self.feature_lengths(torch.tensor(wave_BT.shape[1])))
            packing = Packing.of(frame_lengths_B, width, wave_BT.device)
            convolve = functools.partial(self.convolve, gates=gates)
            row_1ND = packed_strided(convolve, wave_BT, lengths_B, packing.lengths, self.hop)
            raw_BFD, normed_BFD = packing.unpack(row_1ND), packing.unpack(self.norm(row_1ND, gate_of(gates, -1)))
        else:
            raw_BFD = self.convolve(wave_BT, gates)
            normed_BFD = zero_padding(self.norm(raw_BFD, gate_of(gates, -1)), frame_lengths_B)
        features = Frames(normed_BFD, frame_lengths_B, self.rate_hz, raw_BFD)
        self.stem_deviation.copy_(masked_deviation(raw_BFD, features.valid_BF()))
        return features

    def convolve(self, wave_BT: Tensor, gates: tuple[Tensor, ...] = ()) -> Tensor:
        """Runs the convolutions, (B, T) to (B, F, feature_dim), with a scaled gradient."""
        x_BTD = wave_BT[:, :, None]
        for number, conv in enumerate(self.convs):
            if number:
                x_BTD = gated(x_BTD, gate_of(gates, number - 1))
            x_BTD = conv(x_BTD, gate_of(gates, number))
        return scale_gradient(x_BTD, self.gradient_scale)

    def watched(self) -> dict[str, Tensor]:
        """Returns the deviation of the stem; near 0 means collapse, even if later layers still differ."""
        return {"health/std_stem": self.stem_deviation}

    def project(self, features: Frames, gates: tuple[Tensor, ...] = ()) -> Frames:
        x_BFD = self.dropout(self.linear(gated(features.x_BFD, gate_of(gates, -1))))
        return Frames(zero_padding(x_BFD, features.lengths_B), features.lengths_B, self.rate_hz)

    def obstacles(self) -> list[Obstacle]:
        found = []
        if self.group_norm:
            reason = "its statistics cover the whole utterance; train with frontend.norm=layer"
            found.append(Obstacle("frontend.norm", "group", reason))
        if self.normalize:
            reason = "mean and deviation of the whole utterance are unknown in a stream; train with it off"
            found.append(Obstacle("frontend.normalize", True, reason))
        return found

    def sample_window(self) -> SampleWindow:
        taps = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            taps = (taps - 1) * stride + kernel
        return SampleWindow(self.hop, 0, max(taps, self.hop))

    def start(self, rows: int) -> FrontendState:
        """Returns an empty state: overlapping windows of samples are convolved again, 80 of 400 samples per chunk."""
        return ()

    def step(
        self, wave_BT: Tensor, samples_B: Tensor, frames_B: Tensor, state: FrontendState
    ) -> tuple[Frames, FrontendState]:
        lengths_B = self.feature_lengths(samples_B)
        x_BFD = self.linear(self.norm(self.convolve(wave_BT)))
        return Frames(zero_padding(x_BFD, lengths_B), lengths_B, self.rate_hz), ()


def build(config: Config, dim: int) -> WaveformConv:
    return WaveformConv(config, dim)
