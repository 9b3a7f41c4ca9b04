"""Follows a run that was just started until it ends."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.launchers import local
from launch.launchers.processes import STOP_FILE, ChildProcesses
from launch.runs import follow
from launch.runs.job_record import write_record
from pretrain.checkpointing.locate import steps_done


def attend(submitter: ChildProcesses, folder: Path, steps: int, launcher: object) -> int:
    """Starts the run, shows it, and returns its exit code. Ctrl-C asks for a checkpoint, a second one ends it."""
    handle = submitter.submit(folder)
    write_record(folder, handle, launcher)
    print(f"run folder {folder}; watch with: auricle board {shlex.quote(str(folder))}", file=sys.stderr)

    def running() -> bool:
        return submitter.exit_code(handle) is None

    try:
        try:
            follow.follow(folder, steps, running)
        except KeyboardInterrupt:
            print("\nsaving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
            (folder / STOP_FILE).touch()
            follow.follow(folder, steps, running)
    finally:
        submitter.cancel(handle)
    return _verdict(submitter.exit_code(handle) or 0, folder, steps)


def _verdict(code: int, folder: Path, steps: int) -> int:
    done = steps_done(folder)
    newest = folder / "checkpoints" / f"step_{done:08d}"
    if code == ExitCode.STOPPED:
        print(f"stopped after step {done}; the same command continues from {newest}")
        return ExitCode.INTERRUPTED
    if code == ExitCode.DONE and done >= steps:
        print(f"done: {newest}")
        return ExitCode.DONE
    print(local.failure_report(folder), file=sys.stderr)
    ending = f"ended with {_meaning(code)}" if code else f"ended after step {done} of {steps}"
    print(f"auricle pretrain: the run {ending}; all logs are in {folder / 'logs'}", file=sys.stderr)
    return code if code in NEVER_RETRY else ExitCode.FAILED


def _meaning(code: int) -> str:
    """An exit code in words; DeepSpeed's launcher passes on that of a rank that signal N ended as 256 - N."""
    for number in (256 - code, code - 128):
        if number in {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS}:
            name = signal.Signals(number).name
            memory = "; the system kills so what needs too much memory" if number == signal.SIGKILL else ""
            return f"exit code {code}: a rank was ended by {name}{memory}"
    return f"exit code {code}"
