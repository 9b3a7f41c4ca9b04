"""Shows, prepares or starts a job that is one program (preprocess, targets, evaluate)."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.local_speech import speech_manifest
from launch.cli import request
from launch.config import JOB_TYPES, EvaluateJob, ProgramJob
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.in_process import InProcess
from launch.launchers.status import require_ended
from launch.runs.job_record import write_record
from launch.workers import task
from launch.workers.programs import program
from launch.workflows.inputs import require_inputs
from pretrain.evaluate.config import layer_numbers

DRY_RUN, PREPARE = "--dry-run", "--prepare"
SWITCHES = (DRY_RUN, PREPARE)
"""Switches of every command that starts a job: show the job without starting it; write the run folder only."""


def run(command: str, arguments: list[str]) -> int:
    """Runs one command line.

    Args:
        command: the command, a name in launch.workers.programs.
        arguments: its overrides and switches.

    Returns:
        0 if the job is done or queued.

    Raises:
        ConfigError: the command line or the config is wrong.
        ValueError, OSError: the job failed.
    """
    given = request.read(command, JOB_TYPES[command], arguments, switches=SWITCHES)
    if given is None:
        return ExitCode.DONE
    config = _with_inputs(given.config)
    if PREPARE in given.switches:
        print(task.prepare(command, config))
    elif DRY_RUN in given.switches:
        print(plan(command, config))
        program(command).preview(config)
    elif handle := start(command, config):
        report_queued(handle, task.folder_of(command, config), config.launcher.name)
    return ExitCode.DONE


def plan(command: str, config: ProgramJob) -> str:
    """Returns the shell line or script that `start` would run."""
    return factory.make(config.launcher, command).plan(task.folder_of(command, config))


def start(command: str, config: ProgramJob) -> str:
    """Starts a job; returns its handle, or "" if it ran in this process and is done.

    Raises:
        ConfigError: an input is missing; there is no run folder then.
    """
    submitter = factory.make(config.launcher, command)
    require_ended(task.folder_of(command, config))
    require_inputs(config)
    is_new = not task.folder_of(command, config).exists()
    folder = task.prepare(command, config)
    handle = submitter.submit(folder)
    write_record(folder, handle, config.launcher, command)
    if not isinstance(submitter, InProcess):
        return handle
    try:
        submitter.perform(folder)
    except ConfigError:
        if is_new:  # nothing was done, so there is no job to list as failed
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return ""


def report_queued(handle: str, folder: Path, launcher: str) -> None:
    """Prints the queued job and how to follow it."""
    print(f"{launcher} job {handle}, run folder {folder}; `auricle jobs status {shlex.quote(str(folder))}` follows it")


def _with_inputs(config: ProgramJob) -> ProgramJob:
    """Resolves inputs that are named by this process's environment, which a queued job does not have.

    Raises ConfigError for invalid names of tasks and layers, before the job is queued.
    """
    if isinstance(config, EvaluateJob):
        layer_numbers(config)
        from pretrain.evaluate.task_data import inputs

        given = inputs(config)
        if not config.manifest and (manifest := speech_manifest()) and str(manifest) in given.values():
            return replace(config, manifest=str(manifest.absolute()))
    return config
