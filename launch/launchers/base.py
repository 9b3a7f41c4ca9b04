"""Interface of a launcher: plan, submit, status, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Submitter(Protocol):
    """Starts the job of a run folder and keeps track of it.

    A job is `python -m launch.workers.rank FOLDER` on every rank of a pretraining run, and
    `python -m launch.workers.task FOLDER` for other commands. Ranks write their own logs, RUN/logs/rank_N.log, wherever
    they run. A handle is a string that identifies the job to the launcher; it is stored in RUN/job.json, so launchers
    check its form before they use it.
    """

    processes: int
    """Ranks of a pretraining run."""

    def plan(self, folder: Path) -> str:
        """Returns the command that `submit` would run, for display."""
        ...

    def submit(self, folder: Path) -> str:
        """Starts the job of a run folder.

        Args:
            folder: the run folder, with config.json (pretraining) or task.json (other commands).

        Returns:
            The handle of the job.

        Raises:
            ConfigError: the launcher cannot run this job.
            OSError, RuntimeError: the scheduler or cluster refused it; SlurmError for sbatch.
        """
        ...

    def status(self, handle: str) -> State:
        """Returns the state of a job, which another process may have started. Raises ValueError for a wrong handle."""
        ...

    def cancel(self, handle: str) -> None:
        """Ends the job and all of its processes. Raises ValueError for a wrong handle."""
        ...
