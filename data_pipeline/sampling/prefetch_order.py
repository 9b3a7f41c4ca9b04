"""Order in which a plan reads its shards, for prefetching and eviction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.sampling.plan import Plan
from data_pipeline.shards.local import Array

NEVER = np.iinfo(np.int64).max


class PlanSchedule:
    """Read schedule of a plan: a `data_pipeline.shards.local.ReadSchedule`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def windows(self, epoch: int) -> Iterator[Array]:
        """Yields the numbers of the shards of each shuffle window of `epoch`."""
        layout = self._plan.layout(epoch)
        for start, end in zip(layout.window_W1[:-1], layout.window_W1[1:], strict=True):
            yield np.unique(layout.shard_U[start:end])

    def window_of(self, epoch: int, step: int) -> int:
        """Returns the number of the shuffle window of optimizer step `step` of `epoch`."""
        return int(self._plan.layout(epoch).step_W1.searchsorted(step, side="right")) - 1

    def next_use(self, epoch: int, window: int) -> Array:
        """Returns the number of windows from `window` of `epoch` until each shard is read next, (S,).

        NEVER for a shard that is not read before the end of the following epoch.
        """
        use_S = np.full(len(self._plan.catalogue.shards), NEVER, np.int64)
        before = 0
        for number in (epoch, epoch + 1):
            layout = self._plan.layout(number)
            ends = layout.window_W1[1:]
            window_U = np.searchsorted(ends, np.arange(len(layout.shard_U)), side="right") + before - window
            ahead = window_U >= 0
            np.minimum.at(use_S, layout.shard_U[ahead], window_U[ahead])
            before += len(ends)
        return use_S
