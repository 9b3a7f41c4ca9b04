"""Mel frames by conditional flow matching (arXiv 2210.02747), as in Matcha-TTS (arXiv 2309.03199).

Straight paths lead from noise x₀ to mel frames x₁: x_t = (1 − (1 − σ) t) x₀ + t x₁, whose velocity is
x₁ − (1 − σ) x₀. A network learns the velocity given x_t, t and the text's frames; speaking follows it from noise by
Euler's method, in few steps. Where L1 gives the median of what may be spoken, this draws one of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.models.synthesis.blocks import masked
from pretrain.models.synthesis.vocoder import ConvNeXtBlock
from pretrain.nn.positions import sinusoids

SIGMA = 1e-4
"""Deviation of the noise that is left at the end of a path."""
TIME_SCALE = 1_000.0
"""Factor of the time before its sines and cosines, which are made for whole positions."""


@config
class FlowConfig:
    """Sizes of the network that learns the velocity."""

    layers: Annotated[int, about("ConvNeXt blocks", ge=1)] = 6
    inner: Annotated[int, about("channels inside of each block", ge=1)] = 1024


class FlowDraws(NamedTuple):
    """What training draws: the time of each row, (B,), and noise as mel frames, (B, F, n_mels)."""

    time_B: Tensor
    noise_BFM: Tensor


def drawn(rngs: Sequence[np.random.Generator], frames: Sequence[int], width: int, n_mels: int) -> FlowDraws:
    """Returns draws that do not depend on other rows or on padding.

    Args:
        rngs: of each row.
        frames: valid frames of each row; the noise beyond them is zero.
        width: frames of the result.
        n_mels: mel bands.
    """
    noise = np.zeros((len(rngs), width, n_mels), np.float32)
    times = np.zeros(len(rngs), np.float32)
    for row, (rng, length) in enumerate(zip(rngs, frames, strict=True)):
        times[row] = rng.random()
        noise[row, :length] = rng.standard_normal((length, n_mels), np.float32)
    return FlowDraws(torch.from_numpy(times), torch.from_numpy(noise))


def path(noise: Tensor, data: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the point of a path at a time in 0 … 1, and its velocity.

    Args:
        noise, data: beginning and end of the path.
        time: broadcast over them.
    """
    return (1 - (1 - SIGMA) * time) * noise + time * data, data - (1 - SIGMA) * noise


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Returns where the velocity leads from noise, by Euler's method.

    Args:
        velocity: of a point at a time in 0 … 1.
        noise: the point at time 0.
        steps: of equal length.
    """
    x = noise
    for step in range(steps):
        x = x + velocity(x, step / steps) / steps
    return x


class FlowDecoder(nn.Module):
    """Learns the velocity of mel frames, given the text's frames and the median of the mel frames.

    Args:
        config: sizes.
        dim: channels of the text's frames, even.
        n_mels: mel bands.
    """

    def __init__(self, config: FlowConfig, dim: int, n_mels: int) -> None:
        super().__init__()
        self.take_in = nn.Linear(2 * n_mels + dim, dim)
        self.time_in, self.time_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, config.inner, 1 / config.layers) for _ in range(config.layers))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, n_mels)

    def forward(self, x_BFM: Tensor, time_B: Tensor, text_BFD: Tensor, median_BFM: Tensor, valid_BF: Tensor) -> Tensor:
        """Returns the velocity, (B, F, n_mels) fp32, zero where `valid_BF` is False.

        Args:
            x_BFM: points at `time_B`, (B,), in 0 … 1.
            text_BFD: the text's frames.
            median_BFM: mel frames learned by L1.
            valid_BF: bool.
        """
        width = text_BFD.shape[2]
        time_BD = sinusoids(time_B * TIME_SCALE, width).to(text_BFD.dtype)
        time_BD = self.time_out(nn.functional.silu(self.time_in(time_BD)))
        y_BFD = self.take_in(torch.cat([x_BFM.to(text_BFD.dtype), median_BFM.to(text_BFD.dtype), text_BFD], dim=2))
        y_BFD = masked(y_BFD + time_BD[:, None], valid_BF)
        for block in self.blocks:
            y_BFD = block(y_BFD, valid_BF)
        velocity_BFM: Tensor = self.out(self.norm(y_BFD))
        return masked(velocity_BFM.float(), valid_BF)

    def loss(self, draws: FlowDraws, mel_BFM: Tensor, text_BFD: Tensor, median_BFM: Tensor, valid_BF: Tensor) -> Tensor:
        """Returns the mean squared error of the velocity over each row's frames and bands, (B,).

        Args:
            draws: times and noise, on the device.
            mel_BFM: recorded mel frames.
            text_BFD, median_BFM, valid_BF: as in `forward`.
        """
        x_BFM, wanted_BFM = path(draws.noise_BFM, mel_BFM, draws.time_B[:, None, None])
        found_BFM = self(x_BFM, draws.time_B, text_BFD, median_BFM, valid_BF)
        errors_BF = (found_BFM - wanted_BFM).square().mean(2).masked_fill(~valid_BF, 0.0)
        loss_B: Tensor = errors_BF.sum(1) / valid_BF.sum(1).clamp(min=1)
        return loss_B

    def speak(self, noise_BFM: Tensor, text_BFD: Tensor, median_BFM: Tensor, valid_BF: Tensor, steps: int) -> Tensor:
        """Returns mel frames, (B, F, n_mels), from noise in so many steps."""

        def velocity(x_BFM: Tensor, time: float) -> Tensor:
            time_B = torch.full((len(x_BFM),), time, device=x_BFM.device)
            found: Tensor = self(x_BFM, time_B, text_BFD, median_BFM, valid_BF)
            return found

        return masked(integrate(velocity, noise_BFM, steps), valid_BF)
