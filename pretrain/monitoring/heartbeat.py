"""Says which rank is slow, and where it stands, before a hung job fails.

Each rank notes what it is doing; a thread writes that note to RUN/heartbeats/rank_N.json every few seconds. A note that
stays the same nearly as long as a collective may take: the rank says who is the slowest, and its stacks go to its log,
before anybody fails. Where Python itself is stuck, a C timer does that and ends the rank after the collective's time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import sys
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
    """One rank's notes. Use as a context manager around the loop.

    warn_seconds: a phase that takes longer is told about, with stacks; patience_seconds: … ends the process. start: the
    incarnation of the run, by which its ranks are told from those that an earlier start had.
    """

    def __init__(
        self, run_folder: Path, rank: int, patience_seconds: float, warn_seconds: float = math.inf, start: int = 0
    ) -> None:
        self._folder, self._path = run_folder, run_folder / "heartbeats" / f"rank_{rank}.json"
        self._patience, self._warn = patience_seconds, warn_seconds
        self._interval = min(INTERVAL, warn_seconds / 10)  # it tells after at most two of them more
        self._told = 0.0
        self._note: dict[str, Any] = {"start": start, "rank": rank, "step": 0, "phase": PHASES[0], "parts": 0}
        self._note["since"] = time.time()
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
        self._note |= {"step": step, "phase": phase, "parts": 0, "part": "", "since": time.time()}
        faulthandler.dump_traceback_later(self._patience, exit=True, file=STDERR)

    def part(self, name: str) -> None:
        """It begins the next part of its phase. Ranks in a collective have begun more of them than who keeps them."""
        self._note |= {"parts": self._note["parts"] + 1, "part": name}

    def _write(self) -> None:
        while True:
            last = self._closed.wait(self._interval)
            temporary = self._path.with_suffix(".new")
            with contextlib.suppress(OSError):  # a full or absent disk may come back; a thread that ended does not
                temporary.write_text(json.dumps(self._note), encoding="utf-8")
                temporary.replace(self._path)
            if last:
                return
            if time.time() - self._note["since"] > self._warn and self._note["since"] != self._told:
                self._told = self._note["since"]
                self._closed.wait(self._interval)  # until the others have written where they stand, too
                print(f"this rank hangs; {slowest(self._folder, self._note['start'])}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=STDERR)


def slowest(run_folder: Path, start: int, now: float | None = None) -> str:
    """One sentence naming the rank that is furthest behind, or those, among the ranks of incarnation `start`; empty
    where nothing is known of them. (An earlier start may have had more ranks, and its notes are still there.)
    """
    notes = []
    for path in sorted((run_folder / "heartbeats").glob("rank_*.json")):
        try:
            notes.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError):
            continue
    notes = [note for note in notes if note["start"] == start]
    if not notes:
        return ""
    least = min(map(_place, notes))
    behind = [note for note in notes if _place(note) == least]
    first = behind[0]
    who = f"rank {first['rank']}" if len(behind) == 1 else f"one of {', '.join(str(note['rank']) for note in behind)}"
    doing = f"{first['phase']} ({first['part']})" if first.get("part") else first["phase"]
    seconds = (now or time.time()) - first["since"]
    return (
        f"the slowest of {len(notes)} ranks is {who}: {doing} at step {first['step']} for {seconds:.0f} s; "
        "its log has its stacks if it hung"
    )


def _place(note: dict[str, Any]) -> tuple[int, int, int]:
    return note["step"], PHASES.index(note["phase"]), note.get("parts", 0)
