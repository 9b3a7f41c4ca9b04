"""Child processes of a launcher: start, find, stop."""

from __future__ import annotations

import abc
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil

from launch.launchers import process_guard
from launch.launchers.base import State
from launch.workers.environment import free_port

STOP_FILE = "STOP"
"""Creating RUN/STOP asks the ranks to save a checkpoint and end (launch/workers/rank.py)."""


class ChildProcesses(abc.ABC):
    """Starts a run as child processes of this one. Whatever ends this process ends them, too."""

    def __init__(self, processes: int, variables: dict[str, str]) -> None:
        self.processes = processes
        self._variables = variables
        self._jobs: dict[str, subprocess.Popen[bytes]] = {}

    @abc.abstractmethod
    def command(self, folder: Path, port: int) -> list[str]:
        """The command line. `port`: one that is free for the ranks to meet at."""

    def plan(self, folder: Path) -> str:
        """The command as a shell line."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._variables.items())
        return f"{variables} {shlex.join(self.command(folder, 29500))}"

    def submit(self, folder: Path) -> str:
        """Starts the ranks. The handle is the guard's process id and birth, since ids are used again."""
        (folder / STOP_FILE).unlink(missing_ok=True)
        command = [sys.executable, process_guard.__file__, *self.command(folder, free_port())]
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with (folder / "logs" / "launcher.log").open("ab") as log:
            job = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # guard.py's life line
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._variables,
                start_new_session=True,  # Ctrl-C reaches this process alone, which decides
            )
        handle = f"{job.pid}:{psutil.Process(job.pid).create_time()}"
        self._jobs[handle] = job
        return handle

    def status(self, handle: str) -> State:
        """`failed` for a job that is gone: whether its run is complete, the run folder says."""
        return "running" if find_process(handle) else "failed"

    def exit_code(self, handle: str) -> int | None:
        """Of a job that this process started, once all ranks have ended."""
        return self._jobs[handle].poll()

    def cancel(self, handle: str) -> None:
        """Ends the ranks now; those that do not end on SIGTERM are killed."""
        job = self._jobs.get(handle)
        if job is not None:
            if job.stdin and not job.stdin.closed:
                job.stdin.close()
            job.wait()
        elif process := find_process(handle):
            process.terminate()
            process.wait(timeout=3 * process_guard.GRACE)


def find_process(handle: str) -> psutil.Process | None:
    """The living process of a handle."""
    pid, _, birth = handle.partition(":")
    try:
        process = psutil.Process(int(pid))
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and str(process.create_time()) == birth else None
    except psutil.Error:
        return None
