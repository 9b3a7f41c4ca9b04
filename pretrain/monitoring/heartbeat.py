"""Heartbeats: records of each rank's current work, to identify the slow rank before a hanging job is ended.

A thread writes each rank's record to RUN/heartbeats/rank_N.start_K.json every few seconds. If a record does not change
for nearly the timeout of a collective, the rank logs the slowest rank and its own stacks before any collective fails.
If Python itself is stuck, a C timer writes the stacks and ends the rank after the timeout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.json_object import read_object

PHASES = ("reading", "computing", "validating", "saving")
"""Phases of an update, in order; ranks wait for a rank in an earlier phase or update."""
STDERR = 2
"""The file descriptor; the launcher redirects it to this rank's log."""
FORWARD_PASS = "forward pass"
"""The part of an update that begins each of its micro-batches (`Engine.on_phase`)."""
INTERVAL = 5.0
"""Seconds between writes."""


class Heartbeat:
    """Writes one rank's record. A context manager around the training loop.

    Args:
        run_folder: the run.
        rank: this rank.
        patience_seconds: longest duration of a phase, after which the process ends.
        warn_seconds: longest duration of a phase without a report of stacks.
        start: the incarnation of the run, which distinguishes the files of ranks of earlier starts.
        superseded: whether a newer start exists. This rank then stops writing its record, and redirects its output
            from the log that it shares with the newer start.
    """

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        patience_seconds: float,
        warn_seconds: float = math.inf,
        start: int = 0,
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder, self._rank, self._start = run_folder, rank, start
        self._path = run_folder / "heartbeats" / f"rank_{rank}.start_{start}.json"
        self._patience, self._warn, self._superseded = patience_seconds, warn_seconds, superseded
        self._interval = min(INTERVAL, warn_seconds / 10)  # a report comes at most two of them late
        self._reported = 0.0
        self._note: dict[str, Any] = {
            "start": start,
            "rank": rank,
            "step": 0,
            "phase": PHASES[0],
            "parts": 0,
            "micro_batches": 0,
        }
        self._note["since"] = time.time()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for path in self._path.parent.glob(f"rank_{self._rank}.*"):  # of earlier starts
            number = path.name.removeprefix(f"rank_{self._rank}.").removesuffix(".json").removeprefix("start_")
            if number == "json" or (number.isascii() and number.isdecimal() and int(number) < self._start):
                path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Records that `phase` of the update after `step` begins; the next must begin within `patience_seconds`."""
        self._note |= {"step": step, "phase": phase, "parts": 0, "part": "", "micro_batches": 0, "since": time.time()}
        faulthandler.dump_traceback_later(self._patience, exit=True, file=STDERR)

    def part(self, name: str) -> None:
        """Records the next part of the phase; ranks waiting in a collective are further than the rank blocking them."""
        begun = self._note["micro_batches"] + (name == FORWARD_PASS)
        self._note |= {"parts": self._note["parts"] + 1, "part": name, "micro_batches": begun}

    def _write(self) -> None:
        while True:
            last = self._closed.wait(self._interval)
            if self._superseded():
                self._leave_shared_log()
                return
            temporary = self._path.with_suffix(".new")
            with contextlib.suppress(OSError):  # the disk may recover, so keep trying
                temporary.write_text(json.dumps(self._note), encoding="utf-8")
                temporary.replace(self._path)
            if last:
                return
            if time.time() - self._note["since"] > self._warn and self._note["since"] != self._reported:
                self._reported = self._note["since"]
                self._closed.wait(self._interval)  # until the other ranks have also written their records
                print(f"this rank hangs; {slowest(self._folder, self._start)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=STDERR)

    def _leave_shared_log(self) -> None:
        """Redirects this process's output if it goes to a log that a rank of the newer start also writes."""
        shared = self._folder / "logs" / f"rank_{self._rank}.log"
        with contextlib.suppress(OSError):
            if shared.exists() and os.path.samestat(shared.stat(), os.fstat(STDERR)):
                own = shared.with_name(f"rank_{self._rank}.superseded_{self._start}.txt")
                handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(handle, 1)
                os.dup2(handle, STDERR)
                os.close(handle)


@dataclass(frozen=True)
class Note:
    """The record of one rank, as in its file.

    start, rank: of the process.  step, phase: current update and its phase, since the time `since` (s since 1970).
    parts: begun parts of the phase; `part` is the last one.  micro_batches: begun ones of the update.
    """

    start: int
    rank: int
    step: int
    phase: str
    since: float
    parts: int = 0
    part: str = ""
    micro_batches: int = 0

    @property
    def progress(self) -> tuple[int, int, int]:
        """Orders the records of one start: less is further behind."""
        return self.step, PHASES.index(self.phase), self.parts


def read_notes(run_folder: Path) -> list[Note]:
    """Returns the newest record of each rank; without those that are being replaced or are damaged."""
    notes = []
    for path in sorted((run_folder / "heartbeats").glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError):
            notes.append(_note(read_object(path)))
    return notes


def _note(values: dict[str, Any]) -> Note:
    """Returns a record; raises ValueError naming a field that is missing or has the wrong form."""
    note = Note(**{field.name: values.get(field.name, field.default) for field in dataclasses.fields(Note)})
    for name in ("start", "rank", "step", "parts", "micro_batches"):
        if type(getattr(note, name)) is not int or not 0 <= getattr(note, name) < 1 << 63:
            raise ValueError(f"{name} must be a whole number, 0 or more")
    if note.phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}")
    if type(note.since) not in (int, float) or not 0 <= note.since < 1e12:
        raise ValueError("since must be a time in seconds")
    if not isinstance(note.part, str) or not note.part.isprintable():
        raise ValueError("part must be a text")
    return note


def slowest(run_folder: Path, start: int, now: float | None = None) -> str:
    """Returns a sentence naming the rank or ranks that are furthest behind, among the ranks of one start.

    Args:
        run_folder: the run.
        start: the incarnation; records of earlier starts, which may have had more ranks, are ignored.
        now: the time; for tests.

    Returns:
        Empty if there are no records.
    """
    notes = [note for note in read_notes(run_folder) if note.start == start]
    if not notes:
        return ""
    least = min(note.progress for note in notes)
    behind = [note for note in notes if note.progress == least]
    first = behind[0]
    who = f"rank {first.rank}" if len(behind) == 1 else f"one of {', '.join(str(note.rank) for note in behind)}"
    doing = f"{first.phase} ({first.part})" if first.part else first.phase
    seconds = (now or time.time()) - first.since
    return (
        f"the slowest of {len(notes)} ranks is {who}: {doing} at step {first.step} for {seconds:.0f} s; "
        "its log has its stacks if it hung"
    )
