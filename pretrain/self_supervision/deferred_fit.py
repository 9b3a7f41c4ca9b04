"""What is fitted once in a run, to frames of the first update that can be had for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.self_supervision.kmeans import gather_rows


class FittedOnce(nn.Module):
    """Rows of one update until something was fitted to them; `done` is saved, so that a resume knows.

    An update that is left out or computed again fits nothing: its rows are forgotten and the next one gives others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self.done: Tensor
        self.rows: dict[int, Tensor] = {}
        """By micro-batch; empty between updates."""

    @property
    def due(self) -> bool:
        """Whether rows are wanted of this forward pass."""
        return self.training and not self.done

    def forget(self) -> None:
        """Throws the rows away."""
        self.rows.clear()

    def take(self) -> Tensor | None:
        """The rows of all ranks, (N, D), and no more after these; None where nothing was due. A collective."""
        if not self.rows:
            return None
        rows_ND = gather_rows(self.rows)
        self.rows.clear()
        self.done.fill_(True)
        return rows_ND
