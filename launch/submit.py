"""One interface to every place where a job can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Submitter(Protocol):
    """Starts `python -m launch.worker RUN_FOLDER` on every rank of a run, somewhere."""

    def plan(self, folder: Path) -> str:
        """Exactly what `submit` would start, to be read by a person."""
        ...

    def submit(self, folder: Path) -> str:
        """Starts the job of a prepared run folder and returns its handle."""
        ...

    def status(self, handle: str) -> State:
        """Where the job stands."""
        ...

    def logs(self, handle: str) -> Iterator[str]:
        """Lines that rank 0 has printed so far."""
        ...

    def cancel(self, handle: str) -> None:
        """Ends the job and all of its processes."""
        ...
