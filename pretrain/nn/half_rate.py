"""A U-shape over time: the middle blocks of an encoder see half as many frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.packing import TimeGrid


class HalfRate(nn.Module):
    """Joins neighbouring frames in pairs and parts them again (multi-resolution HuBERT, arXiv 2310.02720, §2).

    What is parted again is added to the frames as they were before, so that nothing fine is lost.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.join = nn.Linear(2 * dim, dim)
        self.part = nn.Linear(dim, 2 * dim)

    def down(self, x_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
        """(B, F, D), zero beyond each length, to (B, ⌈F / 2⌉, D); packed utterances by a grid of even starts."""
        if grid is not None:
            x_BFD = grid.spread(x_BFD)
        x_BFD = F.pad(x_BFD, (0, 0, 0, x_BFD.shape[1] % 2))
        joined: Tensor = self.join(x_BFD.reshape(len(x_BFD), -1, 2 * x_BFD.shape[2]))
        return joined

    def up(self, x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
        """(B, ⌈F / 2⌉, D) back to the F frames of `fine_BFD`, added to them."""
        return fine_BFD + fit(self.part(x_BFD).reshape(len(x_BFD), -1, x_BFD.shape[2]), fine_BFD, grid)


def repeated(x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
    """Each frame of the half rate twice: how its layers are shown at the full rate."""
    return fit(x_BFD.repeat_interleave(2, dim=1), fine_BFD, grid)


def fit(x_BFD: Tensor, fine_BFD: Tensor, grid: TimeGrid | None) -> Tensor:
    """Without the frames that were added to make pairs."""
    return x_BFD[:, : fine_BFD.shape[1]] if grid is None else grid.collect(x_BFD, fine_BFD)
