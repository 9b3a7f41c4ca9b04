"""Collects the frames of one update, for parts that are fitted once in a run (clusters, principal axes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.self_supervision.kmeans import gather_rows


class FittedOnce(nn.Module):
    """Holds the rows of one update until something was fitted to them; `done` is saved, so that a resume knows.

    An update that is left out or computed again fits nothing: its rows are discarded and the next one gives others.
    So does one with fewer than `LEAST` rows over all ranks, to which nothing can be fitted.
    """

    LEAST = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self.done: Tensor
        self.rows: dict[int, Tensor] = {}
        """By micro-batch; empty between updates."""

    @property
    def due(self) -> bool:
        """Whether this forward pass must add its rows."""
        return self.training and not self.done

    def forget(self) -> None:
        """Discards the rows."""
        self.rows.clear()

    def take(self) -> Tensor | None:
        """Returns the rows of all ranks, (N, D), once; None where nothing was due or too few came. A collective."""
        if not self.rows:
            return None
        rows_ND = gather_rows(self.rows)
        self.rows.clear()
        if len(rows_ND) < self.LEAST:
            return None
        self.done.fill_(True)
        return rows_ND
