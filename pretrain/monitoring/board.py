"""A TensorBoard writer that never ends training: events are dropped while they cannot be written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from pretrain.monitoring.tag_descriptions import description


class _Describing:
    """Adds its description to the first event of each tag, the one that TensorBoard takes it from."""

    def __init__(self, writer: Any, described: set[str]) -> None:
        self._writer, self._described = writer, described

    def add_summary(self, summary: Any, global_step: int | None = None, walltime: float | None = None) -> None:
        """Writes a summary as torch's writer does."""
        for value in summary.value:
            if value.tag not in self._described and (text := description(value.tag)):
                value.metadata.summary_description = text
            self._described.add(value.tag)
        self._writer.add_summary(summary, global_step, walltime)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


class _Writer(SummaryWriter):
    """torch's writer with descriptions of tags."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._described: set[str] = set()
        super().__init__(*arguments, **options)

    def _get_file_writer(self) -> Any:
        return _Describing(super()._get_file_writer(), self._described)  # type: ignore[no-untyped-call]


MAX_BINS = 256
"""Bins of a histogram; neighbouring codes share one if there are more."""


class Board:
    """Writes events to one folder.

    A failure (a full disk, a quota, an unavailable file system) is reported once; a new event file is tried after
    `retry_seconds`. Errors of TensorBoard's own thread are raised by its next call.

    Args:
        folder: for the event files.
        purge_step: events from this step on, of an earlier start, are hidden.
        say: prints a warning.
        retry_seconds: time between attempts after a failure.
    """

    def __init__(
        self, folder: Path, purge_step: int, say: Callable[[str], None] = print, retry_seconds: float = 60.0
    ) -> None:
        self._folder, self._say, self._retry_seconds = folder, say, retry_seconds
        self._purge_step: int | None = purge_step
        self._writer: SummaryWriter | None = None
        self._failed_at: float | None = None
        self._dropped = 0

    def write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Calls `add` with TensorBoard's writer, or drops the events if they cannot be written."""
        waiting = self._failed_at is not None and time.monotonic() - self._failed_at < self._retry_seconds
        if waiting:
            self._dropped += 1
            return
        try:
            if self._writer is None:
                self._writer = _Writer(str(self._folder), purge_step=self._purge_step, flush_secs=15)
                self._purge_step = None  # a later file of this start adds to the first
            add(self._writer)
            if self._failed_at is not None:
                self._writer.flush()
                self._say(f"TensorBoard events are written again; {self._dropped} were dropped, metrics.jsonl has all")
                self._failed_at, self._dropped = None, 0
        except (OSError, RuntimeError, ValueError) as error:
            if self._failed_at is None:
                self._say(
                    f"warning: TensorBoard events cannot be written to {self._folder} ({error}); training continues "
                    "without them until they can"
                )
            self._failed_at, self._dropped = time.monotonic(), self._dropped + 1
            self._abandon()

    def close(self) -> None:
        """Writes pending events and closes the file; a failure is reported, not raised."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except (OSError, RuntimeError, ValueError) as error:
            self._say(f"warning: the last TensorBoard events were not written to {self._folder} ({error})")

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            if writer is not None:
                writer.close()


def add_counts(writer: SummaryWriter, name: str, counts: np.ndarray, step: int) -> None:
    """Adds counts per code as a histogram of at most MAX_BINS bins, which bounds the cost of large code books."""
    total, codes = float(counts.sum()), np.arange(len(counts), dtype=np.float64)
    if total <= 0:
        return
    edges = np.linspace(0, len(counts), min(MAX_BINS, len(counts)) + 1).round().astype(np.int64)
    writer.add_histogram_raw(
        name,
        min=0.0,
        max=float(len(counts)),
        num=total,
        sum=float((counts * codes).sum()),
        sum_squares=float((counts * codes**2).sum()),
        bucket_limits=edges[1:].astype(np.float64).tolist(),
        bucket_counts=np.add.reduceat(counts, edges[:-1]).tolist(),
        global_step=step,
    )
