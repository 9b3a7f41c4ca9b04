"""RUN/STOP: a file that asks the ranks of a run to save a checkpoint and end.

An empty file (`touch RUN/STOP`) is for whatever start of the run is going on. One that names a start is for that start
alone: Ctrl-C in the terminal of an older start does not stop a newer one. Standard library only.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
START_ID = "AURICLE_START"
"""Environment variable that names a start of a run; launchers set it for everything that they start."""


def request_stop(folder: Path, start: str = "") -> None:
    """Asks the ranks of a run folder to save and end; those of one start, or of any."""
    (folder / STOP_FILE).write_text(start + "\n" * bool(start), encoding="utf-8")


def stop_requested(folder: Path) -> bool:
    """Whether a stop is requested of the start that this process belongs to."""
    try:
        wanted = (folder / STOP_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return False
    return wanted in ("", os.environ.get(START_ID, ""))


class StopRequest:
    """True once SIGTERM, SIGINT, SIGHUP or SIGUSR1 arrived, or RUN/STOP asks for it (watched by rank 0)."""

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
