"""One interface to every place where a job can run, and the note in the run folder that says where it was sent."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pretrain.checkpointing.run_folder import write_json

State = Literal["waiting", "running", "done", "failed", "cancelled"]
NOTE = "job.json"


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


@dataclass(frozen=True)
class JobNote:
    """Where a run was sent: RUN/job.json."""

    launcher: str
    handle: str
    host: str
    submitted: str
    config: dict[str, Any]
    """The launcher's config."""
    verb: str = "pretrain"


def write_note(folder: Path, handle: str, config: Any, verb: str = "pretrain") -> None:
    """Notes that the run of `folder` was submitted."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    note = JobNote(config.name, handle, os.uname().nodename, now, dataclasses.asdict(config), verb)
    write_json(folder / NOTE, dataclasses.asdict(note))


def read_note(folder: Path) -> JobNote:
    """Raises ValueError where no job was submitted."""
    try:
        return JobNote(**json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{folder}: no run was submitted from here (it holds no readable {NOTE})") from None


def steps_done(folder: Path) -> int:
    """Steps of the newest checkpoint."""
    latest = folder / "checkpoints" / "latest"
    name = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
    return int(name.rpartition("_")[2]) if name else 0
