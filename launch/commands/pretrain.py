"""auricle pretrain: shards in, a checkpoint out."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.constraints import Rules
from data_pipeline.shards.writer import done_records
from launch.cli import request as job
from launch.commands import targets
from launch.config import PretrainJob
from launch.launchers import factory, local
from launch.launchers.status import require_ended
from launch.runs import follow, metadata
from launch.runs.job_record import steps_done, write_note
from launch.workers.rank import STALE, UNHEALTHY
from launch.workflows import iterations, sweep
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES, tell

STOPPED = 85
"""A worker's exit code when it saved a checkpoint and stopped on request."""


def run(arguments: list[str]) -> int:
    """Exit code: 0 all steps are done or the job is queued, 1 a rank failed, 2 bad config, 3 unhealthy, 4 superseded by
    a newer start, 130 stopped.
    """
    if sweep.MULTIRUN in arguments:
        return sweep.run(arguments, run)
    request = job.read("pretrain", PretrainJob, arguments, switches=(*SWITCHES, sweep.MULTIRUN))
    if request is None:
        return 0
    config = request.config
    if config.chain:
        return iterations.run(config, arguments, {"targets": targets.run, "pretrain": run})
    if config.link:
        raise ConfigError(f"link={config.link}: this run has no chain")
    submitter = factory.for_job(config)
    if DRY_RUN in request.switches:
        print(submitter.plan(metadata.folder_of(config)))
        return 0
    if PREPARE not in request.switches:
        require_ended(metadata.folder_of(config))
    if isinstance(submitter, local.ChildProcesses):
        Rules.of(config.data)
        _require_shards(config.data.shards)
    folder = metadata.prepare(config)
    if PREPARE in request.switches:
        print(folder)
        return 0
    if isinstance(submitter, local.ChildProcesses):
        return attend(submitter, folder, config.train.steps, config.launcher)
    handle = submitter.submit(folder)
    write_note(folder, handle, config.launcher)
    tell(handle, folder, config.launcher.name)
    return 0


def _require_shards(root: str) -> None:
    """Says so at once, before any rank is started, where there is nothing to read."""
    try:
        done_records(root)
    except ValueError as error:
        raise ConfigError(f"data.shards={root}: {error}") from None


def attend(submitter: local.ChildProcesses, folder: Path, steps: int, launcher: object) -> int:
    """Starts the run, shows it, and returns its exit code. Ctrl-C asks for a checkpoint, a second one ends it."""
    handle = submitter.submit(folder)
    write_note(folder, handle, launcher)
    print(f"run folder {folder}; watch with: auricle board {shlex.quote(str(folder))}", file=sys.stderr)

    def running() -> bool:
        return submitter.exit_code(handle) is None

    try:
        try:
            follow.follow(folder, steps, running)
        except KeyboardInterrupt:
            print("\nsaving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
            (folder / local.STOP_FILE).touch()
            follow.follow(folder, steps, running)
    finally:
        submitter.cancel(handle)
    return _verdict(submitter.exit_code(handle) or 0, folder, steps)


def _verdict(code: int, folder: Path, steps: int) -> int:
    done = steps_done(folder)
    newest = folder / "checkpoints" / f"step_{done:08d}"
    if code == STOPPED:
        print(f"stopped after step {done}; the same command continues from {newest}")
        return 130
    if code == 0 and done >= steps:
        print(f"done: {newest}")
        return 0
    print(local.failure_report(folder), file=sys.stderr)
    ending = f"ended with {_meaning(code)}" if code else f"ended after step {done} of {steps}"
    print(f"auricle pretrain: the run {ending}; all logs are in {folder / 'logs'}", file=sys.stderr)
    return code if code in (2, UNHEALTHY, STALE) else 1


def _meaning(code: int) -> str:
    """An exit code in words; DeepSpeed's launcher passes on that of a rank that signal N ended as 256 - N."""
    for number in (256 - code, code - 128):
        if number in {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS}:
            name = signal.Signals(number).name
            memory = "; the system kills so what needs too much memory" if number == signal.SIGKILL else ""
            return f"exit code {code}: a rank was ended by {name}{memory}"
    return f"exit code {code}"
