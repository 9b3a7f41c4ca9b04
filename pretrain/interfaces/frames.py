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
    """Index in time of each frame, where some were taken out; padding repeats the last. None: 0, 1, 2 …"""

    def valid_BF(self) -> Tensor:
        """Returns (B, F) bool, True where a frame belongs to the utterance and is not padding."""
        return torch.arange(self.x_BFD.shape[1], device=self.lengths_B.device)[None] < self.lengths_B[:, None]


class EncoderOutput(NamedTuple):
    """layers: the first block's input, then the output of each block (normed at the last), all (B, F, D).

    ffn_layers: the last feed-forward part of each block before its residual sum, if the encoder's `keep_ffn` is on.
    """

    layers: tuple[Tensor, ...]
    lengths_B: Tensor
    rate_hz: float
    ffn_layers: tuple[Tensor, ...] = ()

    @property
    def final(self) -> Frames:
        """The last layer."""
        return Frames(self.layers[-1], self.lengths_B, self.rate_hz)


@dataclass(frozen=True, slots=True)
class StepContext:
    """Keys random draws. Masks use (seed, step, segment key); layer drop (seed, step), alike on all ranks."""

    seed: int
    step: int
    """Optimizer steps done before this one."""
