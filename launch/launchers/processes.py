"""Starts, finds and stops the child processes of a launcher."""

from __future__ import annotations

import abc
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_pipeline.core.loopback import free_port
from launch.launchers import process_guard
from launch.launchers.base import State
from launch.launchers.waiting import report_waiting
from launch.workers.stop_request import START_ID, STOP_FILE, request_stop

_HANDLE = re.compile(r"([1-9][0-9]{0,9}):([0-9]{1,12}\.[0-9]{1,9})")


@dataclass(frozen=True)
class _Job:
    process: subprocess.Popen[bytes]
    folder: Path
    start: str


class ChildProcesses(abc.ABC):
    """Starts a run as child processes of this one. They end with it, after saving a checkpoint, however it ends.

    Args:
        processes: number of ranks.
        variables: environment variables of the ranks.
        grace_seconds: time to save a checkpoint after a stop request; 0: derived from the duration of updates.
    """

    def __init__(self, processes: int, variables: dict[str, str], grace_seconds: float = 0.0) -> None:
        self.processes = processes
        self._variables = variables
        self._grace_seconds = grace_seconds
        self._jobs: dict[str, _Job] = {}

    @abc.abstractmethod
    def command(self, folder: Path, port: int) -> list[str]:
        """Returns the command line; `port` is a free port for the rendezvous of the ranks."""

    def plan(self, folder: Path) -> str:
        """Returns the command as a shell line."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._variables.items())
        return f"{variables} {shlex.join(self.command(folder, 29500))}"

    def submit(self, folder: Path) -> str:
        """Starts the ranks of a run folder.

        Returns:
            The handle of the job: process id and start time of its process_guard.

        Raises:
            OSError: the process cannot be started.
        """
        (folder / STOP_FILE).unlink(missing_ok=True)
        report_waiting(folder, "")
        start = secrets.token_hex(8)
        guard = [sys.executable, process_guard.__file__, "--run", str(folder.absolute()), "--start", start]
        guard += ["--grace", str(self._grace_seconds), "--"]
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with (folder / "logs" / "launcher.log").open("ab") as log:
            job = subprocess.Popen(
                [*guard, *self.command(folder, free_port())],
                stdin=subprocess.PIPE,  # process_guard stops the ranks when this pipe closes
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._variables | {START_ID: start},
                start_new_session=True,  # Ctrl-C reaches only this process, which decides what to do
            )
        handle = f"{job.pid}:{psutil.Process(job.pid).create_time()}"
        self._jobs[handle] = _Job(job, folder, start)
        return handle

    def status(self, handle: str) -> State:
        """Returns `running`, or `failed` if the job has ended; the run folder shows whether the run is complete."""
        return "running" if find_process(handle) else "failed"

    def exit_code(self, handle: str) -> int | None:
        """Returns the exit code of a job that this process started, once all ranks have ended."""
        return self._jobs[handle].process.poll()

    def request_stop(self, handle: str) -> None:
        """Requests a checkpoint and the end of a job that this process started."""
        job = self._jobs[handle]
        request_stop(job.folder, job.start)

    def grace(self, handle: str) -> float:
        """Returns the grace period, in seconds, of a job that this process started."""
        return process_guard.grace_seconds(self._jobs[handle].folder, self._grace_seconds)

    def cancel(self, handle: str) -> None:
        """Ends a job: at once if this process started it, otherwise after it has saved a checkpoint.

        Raises:
            TimeoutError: the job did not end within its grace period.
        """
        job = self._jobs.get(handle)
        if job is not None:
            job.process.send_signal(signal.SIGUSR1)
            job.process.wait()
            if job.process.stdin:
                job.process.stdin.close()
        elif process := find_process(handle):
            process.terminate()
            limit = (self._grace_seconds or 600.0) + 3 * process_guard.KILL_SECONDS
            try:
                process.wait(timeout=limit)
            except psutil.TimeoutExpired:
                raise TimeoutError(f"process {process.pid} has not ended {limit:.0f} s after SIGTERM") from None


def find_process(handle: str) -> psutil.Process | None:
    """Returns the running process of a handle; None if it has ended, even if another process now has its id.

    Raises:
        ValueError: the handle is malformed.
    """
    parts = _HANDLE.fullmatch(handle)
    if parts is None:
        raise ValueError(f"handle={handle!r}: must be PROCESS_ID:START_TIME; job.json of the run was altered")
    try:
        process = psutil.Process(int(parts[1]))
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and str(process.create_time()) == parts[2] else None
    except (psutil.Error, OverflowError):
        return None
