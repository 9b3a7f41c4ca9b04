"""U-shaped encoder over time: the middle blocks run at half the frame rate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.numerics import first_frames
from pretrain.nn.packing import TimeGrid


class HalfRate(nn.Module):
    """Joins adjacent frames into pairs and splits them again (multi-resolution HuBERT, arXiv 2310.02720, §2).

    A skip connection adds the frames before the join to the split ones, so that fine detail is kept.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.join = nn.Linear(2 * dim, dim)
        self.part = nn.Linear(dim, 2 * dim)

    def down(self, x_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
        """Halves the frame rate.

        Args:
            x_BFD: (B, F, D), zero beyond each length.
            grid: for packed utterances, with starts at even frames; None for padded rows.

        Returns:
            (B, ⌈F / 2⌉, D).
        """
        if grid is not None:
            x_BFD = grid.spread(x_BFD)
        # not `F % 2` zeros: the exporter must see that the length is even
        x_BFD = first_frames(F.pad(x_BFD, (0, 0, 0, 1)), 2 * ((x_BFD.shape[1] + 1) // 2))
        joined: Tensor = self.join(x_BFD.reshape(x_BFD.shape[0], -1, 2 * x_BFD.shape[2]))
        return joined

    def up(self, x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
        """Restores the frame rate: splits (B, ⌈F / 2⌉, D) and adds the result to the F frames of `fine_BFD`.

        Args:
            x_BFD: (B, ⌈F / 2⌉, D) pairs.
            fine_BFD: (B, F, D) frames before the join.
            grid: as in `down`.
        """
        return fine_BFD + fit(self.part(x_BFD).reshape(x_BFD.shape[0], -1, x_BFD.shape[2]), fine_BFD, grid)


def repeated(x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
    """Repeats each frame at half rate, so that all layers have the same number of frames."""
    return fit(x_BFD.repeat_interleave(2, dim=1), fine_BFD, grid)


def fit(x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
    """Removes the frames that were added to make pairs."""
    return first_frames(x_BFD, fine_BFD.shape[1]) if grid is None else grid.collect(x_BFD, fine_BFD)
