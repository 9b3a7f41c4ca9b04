"""The reason why a run has not started yet, passed from the process that waits to the one at the terminal."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


def _file(folder: Path) -> Path:
    return folder / "logs" / "waiting"


def report_waiting(folder: Path, reason: str) -> None:
    """Reports a new reason in RUN/logs/waiting and on standard output; "" means that the run no longer waits."""
    if waiting_for(folder) == reason:
        return
    file = _file(folder)
    if not reason:
        file.unlink(missing_ok=True)
        return
    print(f"{time.strftime('%F %T')} waiting: {reason}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(reason, encoding="utf-8")


def waiting_for(folder: Path) -> str:
    """Returns the reason why the run of a folder is waiting; "" if it is not."""
    with contextlib.suppress(OSError):
        return _file(folder).read_text(encoding="utf-8", errors="replace")
    return ""
