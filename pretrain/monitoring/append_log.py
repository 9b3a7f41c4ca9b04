"""Appends rows to a JSON-lines file of a run; a full disk delays rows but never ends training."""

from __future__ import annotations

import json
import mmap
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.core.jsonl import append_lines
from pretrain.checkpointing.run_folder import RunFolder

MAX_WAITING = 10_000
"""Rows kept in memory while they cannot be written; the oldest are dropped."""


class AppendLog:
    """Appends to one file, on rank 0 of the newest start only.

    A row that cannot be written is kept and written before the next one; it is never left half written.
    """

    def __init__(self, run: RunFolder, path: Path, say: Callable[[str], None] = print) -> None:
        self._run, self._path, self._say = run, path, say
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING)
        self._warned = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row, or keeps it for later if the file cannot be written; warns once per outage.

        Raises:
            StaleIncarnationError: when a newer start of the run exists.
        """
        self._run.require_current()
        self._waiting.append(json.dumps(row) + "\n")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while self._waiting:
                append_lines(self._path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._warned:
                self._say(
                    f"warning: {self._path} cannot be written ({error}); training continues, and up to {MAX_WAITING} "
                    "rows are kept in memory until it can"
                )
            self._warned = True
            return
        if self._warned:
            self._say(f"{self._path} is written again")
        self._warned = False


def drop_rows_after(path: Path, step: int) -> None:
    """Truncates the file after the last row of at most `step`, which also removes an incomplete last row."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                if _step_of(content[start:end]) <= step:
                    break
                end = start
        file.truncate(end)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
