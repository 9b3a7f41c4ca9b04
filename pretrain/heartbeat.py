"""Says which rank is slow, and where it stands, before a hung job fails.

Each rank notes what it is doing; a thread writes that note to RUN/heartbeats/rank_N.json every few seconds. When one
note stays the same for too long, the rank's stacks go to its log and it exits, from a C timer that also fires while
Python is stuck. The others then fail in their collective and can name it.
"""

from __future__ import annotations

import faulthandler
import json
import threading
import time
from pathlib import Path
from typing import Any

PHASES = ("reading", "computing", "saving")
"""In the order of one step; a rank in an earlier phase of an earlier step is the one that the others wait for."""
STDERR = 2
"""The file descriptor, which the launcher has led to this rank's log."""
INTERVAL = 5.0
"""Seconds between writes."""


class Heartbeat:
    """One rank's notes. Use as a context manager around the loop."""

    def __init__(self, run_folder: Path, rank: int, patience_seconds: float) -> None:
        self._path = run_folder / "heartbeats" / f"rank_{rank}.json"
        self._patience = patience_seconds
        self._note: dict[str, Any] = {"rank": rank, "step": 0, "phase": PHASES[0], "since": time.time()}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """This rank now does `phase` of the update after `step`; it has `patience_seconds` to get to the next."""
        self._note |= {"step": step, "phase": phase, "since": time.time()}
        faulthandler.dump_traceback_later(self._patience, exit=True, file=STDERR)

    def _write(self) -> None:
        while True:
            last = self._closed.wait(INTERVAL)
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps(self._note), encoding="utf-8")
            temporary.replace(self._path)
            if last:
                return


def slowest(run_folder: Path, now: float | None = None) -> str:
    """One sentence naming the rank that is furthest behind; empty where nothing is known."""
    notes = []
    for path in sorted((run_folder / "heartbeats").glob("rank_*.json")):
        try:
            notes.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError):
            continue
    if not notes:
        return ""
    behind = min(notes, key=lambda note: (note["step"], PHASES.index(note["phase"]), note["rank"]))
    seconds = (now or time.time()) - behind["since"]
    return (
        f"the slowest of {len(notes)} ranks is rank {behind['rank']}: {behind['phase']} at step {behind['step']} "
        f"for {seconds:.0f} s; its log has its stacks if it hung"
    )
