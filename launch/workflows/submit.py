"""One way for preprocess, targets and evaluate: read the job, then show it, prepare it, or start it where it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cli import request as job
from launch.launchers import factory
from launch.launchers.in_process import Foreground
from launch.launchers.status import require_ended
from launch.runs.job_record import write_note
from launch.workers import task

DRY_RUN, PREPARE = "--dry-run", "--prepare"
SWITCHES = (DRY_RUN, PREPARE)


def run(verb: str, kind: type[Any], arguments: list[str], preview: Callable[[Any], None] | None = None) -> int:
    """A verb that is one program. Exit code 0: done, or queued. `preview`: what a dry run says besides."""
    request = job.read(verb, kind, arguments, switches=SWITCHES)
    if request is None:
        return 0
    config = request.config
    if PREPARE in request.switches:
        print(task.prepare(verb, config))
        return 0
    if DRY_RUN in request.switches:
        print(plan(verb, config))
        if preview:
            preview(config)
        return 0
    handle = start(verb, config)
    if handle:
        tell(handle, task.folder_of(verb, config), config.launcher.name)
    return 0


def plan(verb: str, config: Any) -> str:
    """Exactly what `start` would start."""
    return factory.make(config.launcher, verb).plan(task.folder_of(verb, config))


def start(verb: str, config: Any) -> str:
    """Starts it. The job's handle; "" where it ran in this process and is done."""
    submitter = factory.make(config.launcher, verb)
    require_ended(task.folder_of(verb, config))
    folder = task.prepare(verb, config)
    handle = submitter.submit(folder)
    write_note(folder, handle, config.launcher, verb)
    if not isinstance(submitter, Foreground):
        return handle
    submitter.perform(folder)
    return ""


def tell(handle: str, folder: Path, launcher: str) -> None:
    """What was queued, and how to follow it."""
    print(f"{launcher} job {handle}, run folder {folder}; auricle jobs status {folder} follows it")
