"""Sequences of frame labels as runs of equal units, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Runs(NamedTuple):
    """Units of rows without repetition.

    ids_BN: int64, padded with -1, at least one column.  frames_BN: frames of each, int64, 0 for padding.
    lengths_B: units of each row.
    """

    ids_BN: Tensor
    frames_BN: Tensor
    lengths_B: Tensor


def begins(labels_BF: Tensor) -> Tensor:
    """Returns where a unit begins, (B, F) bool; -1 marks frames without a label, which end a unit."""
    return (labels_BF >= 0) & (labels_BF != F.pad(labels_BF, (1, 0), value=-1)[:, :-1])


def runs_of(labels_BF: Tensor, width: int | None = None) -> Runs:
    """Joins equal neighbours of frame labels.

    Args:
        labels_BF: int64; -1 marks frames without a label, which belong to no unit and end one.
        width: columns of the result, at least the units of each row; None: as few as possible, for which the host
            waits for the device.
    """
    begins_BF = begins(labels_BF)
    lengths_B = begins_BF.sum(1)
    width = max(int(lengths_B.max()) if width is None else width, 1)
    number_BF = (begins_BF.cumsum(1) - 1).masked_fill(labels_BF < 0, width)  # column `width` is discarded
    ids_BN = labels_BF.new_full((len(labels_BF), width + 1), -1).scatter(1, number_BF, labels_BF)[:, :width]
    counts_BN = labels_BF.new_zeros(len(labels_BF), width + 1)
    counts_BN = counts_BN.scatter_add(1, number_BF, torch.ones_like(labels_BF))[:, :width]
    return Runs(ids_BN, counts_BN, lengths_B)


def frames_of_runs(ids_BN: Tensor, frames_BN: Tensor) -> Tensor:
    """Returns frame labels (B, F) int64, padded with -1, of units and their frames: the inverse of `runs_of`."""
    width = int(frames_BN.sum(1).max()) if frames_BN.numel() else 0
    places_F1 = torch.arange(width, device=ids_BN.device)[:, None]
    number_BF = (frames_BN.cumsum(1)[:, None] <= places_F1).sum(2)
    return F.pad(ids_BN, (0, 1), value=-1).gather(1, number_BF)
