"""Starts a run in the foreground and follows it until it ends."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from pathlib import Path

from data_pipeline.core.text import visible
from launch.cli.signals import SignalledError, raised_signals
from launch.config import LauncherConfig
from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.launchers import local
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import mark_stopped
from launch.launchers.waiting import waiting_for
from launch.runs import follow
from launch.runs.job_record import write_record
from pretrain.checkpointing.locate import steps_done


def run_attended(submitter: ChildProcesses, folder: Path, steps: int, launcher: LauncherConfig) -> int:
    """Starts a run, shows its progress, and returns its exit code.

    Ctrl-C, SIGTERM and SIGHUP request a checkpoint from the ranks and wait for it; a second signal ends them at once.
    After SIGTERM and SIGHUP the wait is limited by launcher.grace_seconds.

    Args:
        submitter: starts the ranks.
        folder: the prepared run folder.
        steps: number of steps of the whole run.
        launcher: the launcher's config, saved in job.json.
    """
    mark_stopped(folder, False)
    with raised_signals():
        handle = submitter.submit(folder)
        deadline, waiting = math.inf, ""

        def running() -> bool:
            nonlocal waiting
            if (reason := waiting_for(folder)) != waiting:
                waiting = reason
                print(f"waiting: {reason}" if reason else "the ranks are being started", file=sys.stderr)
            return submitter.exit_code(handle) is None and time.monotonic() < deadline

        try:
            write_record(folder, handle, launcher)
            print(f"run folder {folder}; watch with: auricle board {shlex.quote(str(folder))}", file=sys.stderr)
            try:
                follow.follow(folder, steps, running)
            except KeyboardInterrupt as signalled:
                submitter.request_stop(handle)
                if isinstance(signalled, SignalledError):
                    deadline = time.monotonic() + submitter.grace(handle)
                print("\nsaving a checkpoint; a second Ctrl-C or signal stops at once", file=sys.stderr)
                follow.follow(folder, steps, running)
        finally:
            submitter.cancel(handle)
    return _verdict(submitter.exit_code(handle) or 0, folder, steps)


def _verdict(code: int, folder: Path, steps: int) -> int:
    done = steps_done(folder)
    newest = folder / "checkpoints" / f"step_{done:08d}"
    if code == ExitCode.STOPPED:
        mark_stopped(folder, True)
        print(f"stopped after step {done}; the same command continues from {newest}")
        return ExitCode.INTERRUPTED
    if code == ExitCode.DONE and done >= steps:
        print(f"done: {newest}")
        for name, value in follow.ending(folder, newest):  # unwrapped: paths and commands are copied from it
            print(visible(f"{name:<21}{value}"))
        return ExitCode.DONE
    print(local.failure_report(folder), file=sys.stderr)
    ending = f"ended with {_meaning(code)}" if code else f"ended after step {done} of {steps}"
    print(f"auricle pretrain: the run {ending}; all logs are in {folder / 'logs'}", file=sys.stderr)
    return code if code in NEVER_RETRY else ExitCode.FAILED


def _meaning(code: int) -> str:
    """Describes an exit code; DeepSpeed's launcher reports a rank that signal N ended as 256 - N."""
    for number in (256 - code, code - 128):
        if number in {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS}:
            name = signal.Signals(number).name
            memory = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
            return f"exit code {code}: a rank was ended by {name}{memory}"
    return f"exit code {code}"
