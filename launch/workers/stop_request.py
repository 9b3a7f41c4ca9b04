"""RUN/STOP, a file that requests the ranks of a run to save a checkpoint and end.

An empty file (`touch RUN/STOP`) stops the current start of the run, whichever it is. A file with the id of a start
stops that start only: Ctrl-C in the terminal of an older start does not stop a newer one. Standard library only.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
START_ID = "AURICLE_START"
"""Environment variable with the id of a start of a run; launchers set it for all processes that they start."""


def request_stop(folder: Path, start: str = "") -> None:
    """Requests a checkpoint and the end of the ranks of a run folder: those with this start id, or all if it is ""."""
    (folder / STOP_FILE).write_text(start + "\n" * bool(start), encoding="utf-8")


def stop_requested(folder: Path) -> bool:
    """Returns whether a stop of the start that this process belongs to is requested."""
    try:
        wanted = (folder / STOP_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return False
    return wanted in ("", os.environ.get(START_ID, ""))


class StopRequest:
    """A callable that returns True after SIGTERM, SIGINT, SIGHUP or SIGUSR1, or a request by RUN/STOP (rank 0 only)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        watches = os.environ.get("RANK", "0") == "0"
        return self._signalled or (watches and stop_requested(self._folder))
