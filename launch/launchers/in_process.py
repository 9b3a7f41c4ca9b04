"""Runs preprocess, targets or evaluate in this process, optionally on a Ray cluster."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import psutil

from launch.config import LocalConfig, RayConfig
from launch.launchers.base import State
from launch.launchers.processes import find_process
from launch.workers import task


class InProcess:
    """Runs the job in this process. The handle is the id and start time of the process."""

    processes = 1

    def __init__(self, config: LocalConfig | RayConfig) -> None:
        self.config = config

    def plan(self, folder: Path) -> str:
        """Returns the command line of an equivalent process."""
        address = ["--ray", self.config.address] if isinstance(self.config, RayConfig) and self.config.address else []
        return shlex.join([sys.executable, "-m", "launch.workers.task", str(folder), *address])

    def submit(self, folder: Path) -> str:
        """Returns the handle; `perform` does the work."""
        return f"{os.getpid()}:{psutil.Process().create_time()}"

    def perform(self, folder: Path) -> None:
        """Runs the job to its end. Exceptions of the command are passed on."""
        if isinstance(self.config, RayConfig):
            task.perform_on_cluster(folder, self.config)
        else:
            task.perform(folder)

    def status(self, handle: str) -> State:
        """Returns `running`, or `failed` if the process has ended; the run folder shows whether the job is complete."""
        return "running" if find_process(handle) else "failed"

    def cancel(self, handle: str) -> None:
        """Sends SIGTERM to the process; Ray then ends its workers."""
        if process := find_process(handle):
            process.terminate()
