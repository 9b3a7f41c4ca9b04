"""Collects the frames of one update, for parts that are fitted once in a run (clusters, principal axes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.self_supervision.kmeans import gather_rows


class FittedOnce(nn.Module):
    """Holds the rows of one update until a part is fitted to them; `done` is saved in checkpoints.

    The rows of an update that is skipped or repeated are discarded, and the next update is used instead. The same
    applies to an update with fewer than `LEAST` rows over all ranks.
    """

    LEAST = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self.done: Tensor
        self.rows: dict[int, Tensor] = {}
        """(N, D) rows by micro-batch; empty between updates."""
        self._fitted: bool | None = None
        """Value of `done` on the host; None: to be read."""
        self.register_load_state_dict_post_hook(lambda module, keys: module.forget())  # type: ignore[no-untyped-call]

    @property
    def due(self) -> bool:
        """Whether this forward pass must add its rows."""
        return self.training and not self.fitted

    @property
    def fitted(self) -> bool:
        """Value of `done`, read from the device once per update."""
        if self._fitted is None:
            self._fitted = bool(self.done)
        return self._fitted

    def forget(self) -> None:
        """Discards the rows; runs after a checkpoint is loaded, too."""
        self.rows.clear()
        self._fitted = None

    def take(self) -> Tensor | None:
        """Returns the rows of all ranks, (N, D), once; None if none were due or too few exist. A collective."""
        if not self.rows:
            return None
        rows_ND = gather_rows(self.rows)
        self.rows.clear()
        if len(rows_ND) < self.LEAST:
            return None
        self.done.fill_(True)
        self._fitted = True
        return rows_ND
