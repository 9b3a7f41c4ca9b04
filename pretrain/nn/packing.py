"""Packs the utterances of a batch end to end into one row without padding, and unpacks them.

Packing is internal to front ends and encoders: their inputs and outputs are (B, F, D), zero beyond each length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Layout of utterances packed into one row.

    lengths: frames of each utterance.  spans: duration of each in frames, longer where frames were removed.  Both are
    on the host.  width: frames of a padded row.  index_N: index of each packed frame in the flattened (B, width).
    """

    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    width: int
    index_N: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, width: int, device: torch.device, places_BF: Tensor | None = None) -> Packing:
        """Builds the packing of rows of `width` frames on `device`; waits for it only where frames were removed."""
        lengths = tuple(lengths_B.tolist())
        spans = lengths if places_BF is None else tuple((places_BF.amax(1) + 1).tolist())
        starts = [row * width for row in range(len(lengths))]
        return cls(lengths, spans, width, _runs(starts, lengths).to(device))

    @property
    def total_1(self) -> Tensor:
        """Length of the packed row, as `Frames.lengths_B`."""
        return torch.tensor([sum(self.lengths)])

    def pack(self, x_BFD: Tensor) -> Tensor:
        """Returns (B, F, …) as one row, (1, N, …)."""
        return x_BFD.flatten(0, 1).index_select(0, self.index_N)[None]

    def unpack(self, x_1ND: Tensor) -> Tensor:
        """Returns one row, (1, N, D), as (B, F, D), zero beyond each length."""
        B, D = len(self.lengths), x_1ND.shape[2]
        return x_1ND.new_zeros(B * self.width, D).index_copy(0, self.index_N, x_1ND[0]).view(B, self.width, D)


class TimeGrid(NamedTuple):
    """A time axis for convolutions over frames that are not stored at their times.

    index_M: index of each of the (B, F) frames in the flattened (rows, width).  inside_RW1: True inside utterances, for
    stacked convolutions, each of which needs zeros between utterances; None if only the first one does.
    """

    rows: int
    width: int
    index_M: Tensor
    inside_RW1: Tensor | None = None

    @classmethod
    def spaced(
        cls,
        lengths: Sequence[int],
        gap: int,
        device: torch.device,
        multiple: int = 1,
        places: tuple[Tensor, Sequence[int]] | None = None,
    ) -> TimeGrid:
        """Builds the axis of packed utterances.

        Args:
            lengths: frames of each utterance.
            gap: least number of zeros between two utterances.
            device: device of the indices.
            multiple: utterances start at multiples of this.
            places: where frames were removed, the time index of each, (1, N), and the time span of each utterance.
        """
        spans = lengths if places is None else places[1]
        starts, width = [], 0
        for span in spans:
            starts.append(width)
            width = -(-(width + span + gap) // multiple) * multiple
        inside_W = torch.zeros(width, dtype=torch.bool)
        inside_W[_runs(starts, spans)] = True
        if places is None:
            index_N = _runs(starts, lengths).to(device)
        else:
            index_N = places[0][0] + torch.tensor(starts).repeat_interleave(torch.tensor(lengths)).to(device)
        return cls(1, width, index_N, inside_W[None, :, None].to(device))

    def spread(self, x_BFD: Tensor) -> Tensor:
        """Places (B, F, D) frames on the axis, (rows, width, D), zero elsewhere."""
        # added, not assigned: padding, which is zero, may have the index of another frame
        grid = x_BFD.new_zeros(self.rows * self.width, x_BFD.shape[2])
        return grid.index_add(0, self.index_M, x_BFD.flatten(0, 1)).view(self.rows, self.width, -1)

    def collect(self, y_RWD: Tensor, like_BFD: Tensor) -> Tensor:
        """Gathers the frames from (rows, width, E) into (B, F, E)."""
        return y_RWD.flatten(0, 1).index_select(0, self.index_M).view(*like_BFD.shape[:2], y_RWD.shape[2])


def packed_strided(
    convolve: Callable[[Tensor], Tensor], wave_BT: Tensor, lengths_B: Tensor, frames: Sequence[int], hop: int
) -> Tensor:
    """Runs unpadded convolutions over concatenated waveforms; each utterance has the same result as alone.

    Args:
        convolve: (1, T) audio to (1, F, D) frames, with a total stride of `hop`.
        wave_BT: (B, T) audio.
        lengths_B: samples of each row.
        frames: valid frames of each row.
        hop: total stride in samples; utterances start at its multiples, so that no valid frame covers two of them.

    Returns:
        The valid frames, packed, (1, N, D).
    """
    samples = lengths_B.tolist()
    spans = [-(-n // hop) * hop for n in samples]
    waves = [F.pad(wave_T[:n], (0, span - n)) for wave_T, n, span in zip(wave_BT, samples, spans, strict=True)]
    row_T = torch.cat(waves)
    # utterances shorter than a frame may not fill the convolutions' kernels: pad to the batch's width
    row_T = F.pad(row_T, (0, max(0, wave_BT.shape[1] - len(row_T))))
    x_FD = convolve(row_T[None])[0]
    starts = [sum(spans[:row]) // hop for row in range(len(spans))]
    return x_FD.index_select(0, _runs(starts, frames).to(x_FD.device))[None]


def _runs(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Returns start, start + 1, … of each run, (Σ lengths,)."""
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
