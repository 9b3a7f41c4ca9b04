"""Interface of a launcher: plan, submit, status, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Submitter(Protocol):
    """Starts the job of a run folder: `python -m launch.workers.rank FOLDER` on every rank of a pretraining run,
    `python -m launch.workers.task FOLDER` for other commands.

    Ranks write their own logs, RUN/logs/rank_N.log, wherever they run. A handle is a string that identifies the job to
    the launcher; it is stored in RUN/job.json, so launchers check its form before they use it.
    """

    processes: int
    """Ranks of a pretraining run."""

    def plan(self, folder: Path) -> str:
        """Returns what `submit` would start, in a form to read."""
        ...

    def submit(self, folder: Path) -> str:
        """Starts the job of a prepared run folder and returns its handle."""
        ...

    def status(self, handle: str) -> State:
        """Returns the state of a job, also one that another process started."""
        ...

    def cancel(self, handle: str) -> None:
        """Ends the job and all of its processes."""
        ...
