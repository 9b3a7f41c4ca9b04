"""Interface of a launcher: submit, status, logs, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Submitter(Protocol):
    """Starts the job of a run folder: `python -m launch.workers.rank FOLDER` on every rank of a pretraining run,
    `python -m launch.workers.task FOLDER` for the other verbs.

    Logs need no part of it: wherever a rank runs, it writes RUN/logs/rank_N.log.
    """

    processes: int
    """Ranks of a pretraining run."""

    def plan(self, folder: Path) -> str:
        """Exactly what `submit` would start, to be read by a person."""
        ...

    def submit(self, folder: Path) -> str:
        """Starts the job of a prepared run folder and returns its handle."""
        ...

    def status(self, handle: str) -> State:
        """Where the job stands, asked from any process."""
        ...

    def cancel(self, handle: str) -> None:
        """Ends the job and all of its processes."""
        ...
