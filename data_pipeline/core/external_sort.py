"""Sorts rows that need not fit into memory."""

from __future__ import annotations

import heapq
import marshal
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

ROWS: Final = 100_000
"""Rows that are sorted in memory."""
BLOCK: Final = 500
"""Rows that are read at a time from each sorted run."""


class ExternalSort:
    """Sorts rows by a key: `add` them all, then iterate, as often as needed.

    Rows with equal keys keep the order in which they were added. At most `ROWS` rows and a block of each sorted run are
    in memory; rows that are added in order form one run, which is read without merging. The file on disk has no
    name and ends with the process.

    Args:
        folder: folder of the file; None: that for temporary files. Nothing is written up to `ROWS` rows.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: list[tuple[Any, int, Any]] = []
        self._runs: list[list[tuple[int, int]]] = []
        self._last: tuple[Any, int] | None = None
        self._file: IO[bytes] | None = None
        self._count = 0

    def add(self, key: Any, row: Any) -> None:
        """Adds a row. Key and row consist of numbers, texts, bytes, None, and tuples and lists of them."""
        self._held.append((key, self._count, row))
        self._count += 1
        if len(self._held) >= ROWS:
            self._spill()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yields (key, row) in the order of the keys."""
        if not self._runs:
            self._held.sort()
            return ((key, row) for key, _, row in self._held)
        self._spill()
        runs = [self._read(run) for run in self._runs]
        return ((key, row) for key, _, row in (runs[0] if len(runs) == 1 else heapq.merge(*runs)))

    def _spill(self) -> None:
        if not self._held:
            return
        self._held.sort()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (open as long as this object)
        if self._last is None or self._held[0][:2] < self._last:
            self._runs.append([])
        for start in range(0, len(self._held), BLOCK):
            block = marshal.dumps(self._held[start : start + BLOCK])
            self._runs[-1].append((self._file.tell(), len(block)))
            self._file.write(block)
        self._file.flush()
        self._last = self._held[-1][:2]
        self._held = []

    def _read(self, run: list[tuple[int, int]]) -> Iterator[tuple[Any, int, Any]]:
        assert self._file is not None
        for offset, size in run:
            yield from marshal.loads(os.pread(self._file.fileno(), size, offset))
