"""Tensors that modules exchange: frames, encoder outputs and the context of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Frames(NamedTuple):
    """x_BFD: features; lengths_B: valid frames of each row, int64; rate_hz: frames per second.

    raw_BFD: the features before a learned last normalisation, where there is one; feature penalties act on it.
    """

    x_BFD: Tensor
    lengths_B: Tensor
    rate_hz: float
    raw_BFD: Tensor | None = None
    places_BF: Tensor | None = None
    """Time index of each frame if frames were removed; padding repeats the last one. None: 0, 1, 2 …"""

    def valid_BF(self) -> Tensor:
        """Returns (B, F) bool, False for padding."""
        return torch.arange(self.x_BFD.shape[1], device=self.lengths_B.device)[None] < self.lengths_B[:, None]


class EncoderOutput(NamedTuple):
    """layers: the input of the first block, then the output of each block (the last one normalised), all (B, F, D).

    ffn_layers: output of the last feed-forward part of each block before its residual sum, if `keep_ffn` is set.
    """

    layers: tuple[Tensor, ...]
    lengths_B: Tensor
    rate_hz: float
    ffn_layers: tuple[Tensor, ...] = ()

    @property
    def final(self) -> Frames:
        """The last layer."""
        return Frames(self.layers[-1], self.lengths_B, self.rate_hz)


class BlockGates(NamedTuple):
    """Factors of one block that structured pruning learns: one per head, and per inner channel of each feed-forward."""

    heads_H: Tensor
    channels: tuple[Tensor, ...]
    """(C,) for each feed-forward part, in order."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """Keys of random draws: (seed, step, segment key) for masks, (seed, step) for layer drop, the same on all ranks."""

    seed: int
    step: int
    """Optimizer steps done before this one."""
