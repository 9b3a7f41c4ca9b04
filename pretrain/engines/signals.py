"""Signals between ranks: a record of fixed layout that is summed over all ranks with the metrics of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankSignals:
    """Signals of one rank to the other ranks, exchanged once per update.

    After summation every rank has the same record and takes the same decision: a flag is set where any rank set it, a
    count is the sum over ranks. `unhealthy` and `roll_back_before` are set by rank 0 alone.
    """

    stop_requested: bool = False
    """Whether a rank received a request to stop."""
    unhealthy: bool = False
    """Whether rank 0's health monitor ends the run."""
    roll_back_before: int = 0
    """Step before which rank 0's health monitor rolls back; 0: no rollback."""
    skipped_segments: int = 0
    """Segments that readers left out."""
    segments: int = 0
    """Segments whose audio was checked for silence; 0 where no check was due."""
    silent_segments: int = 0
    """Checked segments that are silent or constant."""
    wait_seconds: tuple[float, ...] = (0.0,)
    """Seconds that each rank waited for data, by rank."""

    @staticmethod
    def waited(rank: int, size: int, seconds: float) -> tuple[float, ...]:
        """Returns the `wait_seconds` that one of `size` ranks reports."""
        return tuple(seconds if other == rank else 0.0 for other in range(size))

    def packed(self) -> Tensor:
        """Returns the record as float64, (6 + ranks,), to be summed over ranks."""
        counts = (self.roll_back_before, self.skipped_segments, self.segments, self.silent_segments)
        numbers = (self.stop_requested, self.unhealthy, *counts, *self.wait_seconds)
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def unpacked(cls, values: Tensor) -> RankSignals:
        """Returns the record of a summed `packed` tensor."""
        stop_requested, unhealthy, roll_back_before, skipped, segments, silent, *waits = values.tolist()
        return cls(
            stop_requested=stop_requested > 0,
            unhealthy=unhealthy > 0,
            roll_back_before=round(roll_back_before),
            skipped_segments=round(skipped),
            segments=round(segments),
            silent_segments=round(silent),
            wait_seconds=tuple(waits),
        )
