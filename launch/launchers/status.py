"""State of a run, from its launcher and its folder."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Literal

from data_pipeline.core.schema import ConfigError
from launch.launchers import factory
from launch.launchers.base import State
from launch.launchers.in_process import InProcess
from launch.launchers.processes import ChildProcesses
from launch.launchers.slurm import SlurmError
from launch.runs.job_record import JobRecord, read_record
from launch.runs.summary import ALIVE_SECONDS, last_activity, summarise
from launch.workers import task
from pretrain.checkpointing.locate import steps_done
from pretrain.checkpointing.run_folder import read_config


def state_of(folder: Path) -> State | Literal["unknown"]:
    """Returns the state of a run.

    It is the launcher's state; `done` once all steps are done, and `unknown` if the launcher does not answer. For
    processes on another machine only the heartbeats of the ranks are visible: `running` while those are recent.
    """
    note = read_record(folder)
    if is_elsewhere(note):
        if complete(folder):
            return "done"
        return "running" if time.time() - last_activity(folder) < ALIVE_SECONDS else "unknown"
    try:
        state = factory.for_record(note).status(note.handle)
    except (SlurmError, ValueError):  # no answer, or a handle of another form
        return "done" if complete(folder) else "unknown"
    return "done" if state == "failed" and complete(folder) else state


def shown_state(folder: Path) -> str:
    """Returns the state of a run as `auricle runs` and `auricle jobs` show it.

    It is that of `state_of`, or `unhealthy`, or `stopped` for a run that was stopped on request with a checkpoint. Runs
    without a record of a job have a state by their files alone.
    """
    if (folder / "UNHEALTHY").is_file():
        return "unhealthy"
    try:
        state = state_of(folder)
    except (ValueError, KeyError):
        return summarise(folder).state
    return "stopped" if state == "failed" and _stopped_mark(folder).exists() else state


def mark_stopped(folder: Path, stopped: bool) -> None:
    """Notes that a run was stopped on request, or that it has been started again."""
    mark = _stopped_mark(folder)
    if stopped:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def _stopped_mark(folder: Path) -> Path:
    return folder / "logs" / "stopped"


def is_elsewhere(note: JobRecord) -> bool:
    """Returns whether the job is a process on another machine, which cannot be queried or ended from here."""
    return note.host != os.uname().nodename and isinstance(factory.for_record(note), ChildProcesses | InProcess)


def require_ended(folder: Path) -> None:
    """Raises ConfigError if the run of `folder` is waiting or running: a second start would supersede the first."""
    try:
        note, state = read_record(folder), state_of(folder)
    except (ValueError, KeyError):
        return  # never submitted, or by a version with another record format
    if note.handle.startswith(f"{os.getpid()}:"):
        return  # an earlier job of this process
    if state in ("waiting", "running"):
        where = f" on {note.host}" if is_elsewhere(note) else ""
        silent = f"; if it died there, wait until it has been silent for {ALIVE_SECONDS:.0f} s" if where else ""
        raise ConfigError(
            f"{folder}: {note.launcher} job {note.handle} is {state}{where}; "
            f"`auricle jobs cancel {shlex.quote(str(folder))}`{where} ends it{silent}; "
            "name=NAME gives another job its own run folder"
        )


def complete(folder: Path) -> bool:
    """Returns whether the run folder contains the result of the whole job."""
    steps = total_steps(folder)
    return steps_done(folder) >= steps if steps else (folder / task.RESULT).is_file()


def total_steps(folder: Path) -> int:
    """Returns the steps of a pretraining run; 0 for other jobs."""
    if not (folder / "config.json").exists():
        return 0
    steps: int = read_config(folder)["train"]["steps"]
    return steps
