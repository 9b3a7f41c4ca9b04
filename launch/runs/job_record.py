"""One interface to every place where a job can run, and the note in the run folder that says where it was sent."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.atomic_files import write_json

NOTE = "job.json"


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
