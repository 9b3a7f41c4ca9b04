"""Runs preprocess, targets or evaluate in this very process, on this machine or on a Ray cluster."""

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


class Foreground:
    """The handle is this process's id and birth: another one can ask for it and end it."""

    processes = 1

    def __init__(self, config: LocalConfig | RayConfig) -> None:
        self.config = config

    def plan(self, folder: Path) -> str:
        """The same as one process."""
        address = ["--ray", self.config.address] if isinstance(self.config, RayConfig) and self.config.address else []
        return shlex.join([sys.executable, "-m", "launch.workers.task", str(folder), *address])

    def submit(self, folder: Path) -> str:
        """Only the handle; `perform` does the work."""
        return f"{os.getpid()}:{psutil.Process().create_time()}"

    def perform(self, folder: Path) -> None:
        """Does it. Raises what the verb raises."""
        if isinstance(self.config, RayConfig):
            task.perform_on_cluster(folder, self.config)
        else:
            task.perform(folder)

    def status(self, handle: str) -> State:
        """`failed` for one that is gone: whether it is done, the run folder says."""
        return "running" if find_process(handle) else "failed"

    def cancel(self, handle: str) -> None:
        """Asks the process to end; Ray then ends its workers."""
        if process := find_process(handle):
            process.terminate()
