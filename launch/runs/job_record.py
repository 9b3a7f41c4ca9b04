"""RUN/job.json, the record of a submitted job."""

from __future__ import annotations

import dataclasses
import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.json_object import read_object
from launch.config import LAUNCHERS, LauncherConfig

FILE_NAME = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """The data with which a launcher finds the job of a run."""

    launcher: str
    """local, slurm or ray."""
    handle: str
    """The launcher's id of the job."""
    host: str
    """The machine that submitted the job."""
    submitted: str
    """Time of the submission, UTC, as ISO 8601."""
    config: dict[str, Any]
    """The launcher's config."""
    command: str = "pretrain"
    """The command of the job: pretrain, or a program (launch.workers.programs)."""


def write_record(folder: Path, handle: str, config: LauncherConfig, command: str = "pretrain") -> None:
    """Writes job.json for a submitted job.

    Args:
        folder: the run folder.
        handle: the launcher's id of the job.
        config: the launcher's config.
        command: the command of the job.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = JobRecord(
        config.name,
        handle=handle,
        host=os.uname().nodename,
        submitted=now,
        config=dataclasses.asdict(config),
        command=command,
    )
    write_json(folder / FILE_NAME, dataclasses.asdict(record))


def read_record(folder: Path) -> JobRecord:
    """Reads the job.json of a run folder.

    Raises:
        ValueError: no job was submitted from this folder, or the file is invalid.
    """
    file = folder / FILE_NAME
    try:
        values = read_object(file)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no run was submitted from here ({FILE_NAME} is missing)") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); start the run again, it continues") from None
    if "verb" in values:  # its name in earlier versions
        values["command"] = values.pop("verb")
    fields = {field.name: dict if field.name == "config" else str for field in dataclasses.fields(JobRecord)}
    problem = ""
    if unknown := values.keys() - fields.keys():
        problem = f"has the unknown field {min(map(str, unknown))}"
    for name, kind in fields.items() if not problem else ():
        if not problem and not isinstance(values.get(name, "pretrain" if name == "command" else None), kind):
            problem = f"{name} must be {'an object' if kind is dict else 'a text'}"
    if not problem and values["launcher"] not in LAUNCHERS:
        problem = f"launcher={values['launcher']!r}, must be one of {', '.join(sorted(LAUNCHERS))}"
    if problem:
        raise ValueError(f"{file}: {problem}; start the run again, it continues")
    return JobRecord(**values)
