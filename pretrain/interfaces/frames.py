"""Tensors that modules exchange: frames, encoder outputs and the context of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def valid_frames(lengths_B: Tensor, width: int, device: torch.device) -> Tensor:
    """Returns (B, width) bool on `device`, False beyond each length.

    Args:
        lengths_B: frames of each row.
        width: number of frames of a padded row.
        device: of the result.
    """
    return torch.arange(width, device=device)[None] < lengths_B.to(device, non_blocking=True)[:, None]


class Frames(NamedTuple):
    """x_BFD: features; lengths_B: valid frames of each row, int64, on the host; rate_hz: frames per second.

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
        return valid_frames(self.lengths_B, self.x_BFD.shape[1], self.x_BFD.device)


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


class ModelGates(NamedTuple):
    """Factors of all parts of a model that structured pruning may remove; an empty part has none."""

    frontend: tuple[Tensor, ...] = ()
    """(C,) for each of the front end's `channel_groups`."""
    blocks: tuple[BlockGates, ...] = ()


@dataclass(frozen=True, slots=True)
class StepContext:
    """Keys of random draws: (seed, step, segment key) for masks, (seed, step) for layer drop, the same on all ranks."""

    seed: int
    step: int
    """Optimizer steps done before this one."""
