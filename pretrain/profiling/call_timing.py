"""Times calls in turn, so that a change of load hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pretrain.profiling.graph_timing import median_and_p95

UNCOUNTED = 2
"""First runs of each call, which are not counted."""


class CallTiming(NamedTuple):
    """Milliseconds of one call: median and 95th percentile of the wall clock, and median of processor time.

    Processor time of one thread is what the wall clock would show on a machine without other load.
    """

    p50: float
    p95: float
    cpu: float


def time_in_turn(calls: Sequence[Callable[[], object]], runs: int) -> list[CallTiming]:
    """Runs each call `runs` times, one run of each in turn; returns the timing of each."""
    wall: list[list[float]] = [[] for _ in calls]
    processor: list[list[float]] = [[] for _ in calls]
    for repeat in range(runs + UNCOUNTED):
        for call, walls, processors in zip(calls, wall, processor, strict=True):
            begun, begun_cpu = time.perf_counter(), time.process_time()
            call()
            if repeat >= UNCOUNTED:
                walls.append(1e3 * (time.perf_counter() - begun))
                processors.append(1e3 * (time.process_time() - begun_cpu))
    return [CallTiming(*median_and_p95(w), statistics.median(p)) for w, p in zip(wall, processor, strict=True)]
