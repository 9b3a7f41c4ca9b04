"""Signals between ranks: a record of fixed layout that is summed over all ranks with the metrics of an update."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankSignals:
    """Signals of one rank to the other ranks, exchanged once per update.

    After summation every rank has the same record and takes the same decision. A field is a count over ranks, or is set
    by rank 0 alone and is 0 on all other ranks.
    """

    stop_requested: float = 0.0
    """Ranks that received a request to stop; one is enough."""
    unhealthy: float = 0.0
    """1 where rank 0's health monitor ends the run."""
    roll_back_before: float = 0.0
    """Step before which rank 0's health monitor rolls back; 0: no rollback."""
    skipped_segments: float = 0.0
    """Segments that readers left out."""
    segments: float = 0.0
    """Segments whose audio was checked for silence; 0 where no check was due."""
    silent_segments: float = 0.0
    """Checked segments that are silent or constant."""
    wait_seconds: tuple[float, ...] = (0.0,)
    """Seconds that each rank waited for data, by rank."""

    @staticmethod
    def waited(rank: int, size: int, seconds: float) -> tuple[float, ...]:
        """Returns the `wait_seconds` that one of `size` ranks reports."""
        return tuple(seconds if other == rank else 0.0 for other in range(size))

    def packed(self) -> Tensor:
        """Returns the record as float64, (6 + ranks,)."""
        numbers = [getattr(self, field.name) for field in fields(self)[:-1]]
        return torch.tensor([*numbers, *self.wait_seconds], dtype=torch.float64)

    @classmethod
    def unpacked(cls, values: Tensor) -> RankSignals:
        """Returns the record of a summed `packed` tensor."""
        numbers, names = values.tolist(), [field.name for field in fields(cls)[:-1]]
        return cls(**dict(zip(names, numbers, strict=False)), wait_seconds=tuple(numbers[len(names) :]))
