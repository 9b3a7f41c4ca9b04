"""Runs a job on a Ray cluster: driven from this process, or submitted as a Ray Job."""

from __future__ import annotations

import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from data_pipeline.core import plugins
from data_pipeline.core.schema import ConfigError
from launch.config import JOB_ID, RayConfig
from launch.launchers.base import State
from launch.launchers.processes import ChildProcesses
from launch.workers.environment import RANK_LOGS

STARTING = 60.0
"""Seconds after the dashboard first answers within which the cluster must accept a job."""
STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "STOPPED": "cancelled",
    "FAILED": "failed",
}


def require_job_id(handle: str) -> str:
    """Returns `handle` if it is the submission id of a Ray Job. Raises ValueError otherwise."""
    if not JOB_ID.fullmatch(handle):
        raise ValueError(f"handle={handle!r}: must be the submission id of a Ray Job, such as raysubmit_1a2b3c")
    return handle


def driver_command(config: RayConfig, folder: Path) -> list[str]:
    """Returns the command line of launch.launchers.ray_driver."""
    options = {
        "address": config.address or ("auto" if config.dashboard else ""),
        "workers": config.workers,
        "min-workers": config.min_workers,
        "gpus": config.gpus_per_worker,
        "cpus": config.cpus_per_worker,
        "retries": config.retries,
        "wait-minutes": config.wait_minutes,
        "answer-seconds": config.answer_seconds,
        "grace": config.grace_seconds,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value != ""]
    return [sys.executable, "-m", "launch.launchers.ray_driver", *given, str(folder.absolute())]


class RayHere(ChildProcesses):
    """Runs the driver as a child process of this one; Ray places the ranks."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        variables = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        # with workers=0 the run uses as many ranks as the cluster can hold and the plan allows
        super().__init__(config.workers or 1, variables, config.grace_seconds)

    def command(self, folder: Path, port: int) -> list[str]:
        """Returns the driver's command line; `port` is unused, since rank 0 chooses a port on its own node."""
        return driver_command(self.config, folder)


class RayJobs:
    """Runs the driver on the cluster as a Ray Job; the handle is its submission id.

    Anyone with access to a Ray dashboard can run any code on the cluster. auricle never exposes one: keep the dashboard
    on localhost, Ray's default, and use an ssh tunnel.

    Args:
        config: the cluster and the number of ranks.
        command: the command that runs in the job.
    """

    VARIABLES: Final = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", RANK_LOGS: "1"}

    def __init__(self, config: RayConfig, command: str = "pretrain") -> None:
        self.config = config
        self.processes = config.workers or 1
        self._command = command

    def command(self, folder: Path) -> list[str]:
        """Returns the command line that runs on the cluster."""
        address = self.config.address or "auto"
        task = [sys.executable, "-m", "launch.workers.task", str(folder.absolute())]
        lines = {"pretrain": driver_command(self.config, folder), "evaluate": task}
        line = lines.get(self._command, [*task, "--ray", address])
        if self.config.after:
            line = [sys.executable, "-m", "launch.launchers.ray_wait", self.config.after, *line]
        return line

    def plan(self, folder: Path) -> str:
        """Returns the entrypoint of the job, quoted for the shell that Ray passes it to."""
        return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(self.command(folder))}"

    def submit(self, folder: Path) -> str:
        """Submits the job of a run folder and returns its submission id.

        Raises:
            ConfigError: no dashboard answers in time.
            RuntimeError: the cluster refused the job.
        """
        place = {}
        if self._command == "evaluate":  # the only command that computes in its entrypoint
            place = {"entrypoint_num_cpus": self.config.cpus_per_worker}
            place |= {"entrypoint_num_gpus": self.config.gpus_per_worker} if self.config.gpus_per_worker else {}
        variables = self.VARIABLES | ({} if self.config.gpus_per_worker else {"DS_ACCELERATOR": "cpu"})
        if allowed := os.environ.get(plugins.VARIABLE):
            variables |= {plugins.VARIABLE: allowed}
        environment = {"env_vars": variables}
        deadline = time.monotonic() + STARTING
        while True:
            try:
                handle: str = self._client().submit_job(entrypoint=self.plan(folder), runtime_env=environment, **place)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)  # the cluster is just starting
                continue
            return handle

    def status(self, handle: str) -> State:
        """Returns the state of a job, `failed` for one that the cluster no longer knows.

        Raises ConfigError if no dashboard answers.
        """
        job = require_job_id(handle)
        client = self._client()
        try:
            return STATES.get(str(client.get_job_status(job)), "failed")
        except (OSError, RuntimeError) as error:
            if "does not exist" in str(error):
                return "failed"
            raise ConfigError(f"launcher.dashboard={self.config.dashboard}: {error}") from None

    def logs(self, handle: str) -> str:
        """Returns the driver's output."""
        job = require_job_id(handle)
        text: str = self._client().get_job_logs(job)
        return text

    def cancel(self, handle: str) -> None:
        """Sends SIGTERM to the driver, which asks the ranks for a checkpoint."""
        job = require_job_id(handle)
        self._client().stop_job(job)

    def _client(self) -> Any:
        """Returns a client of the dashboard. Raises ConfigError if none answers in time."""
        from ray.job_submission import JobSubmissionClient

        address, seconds = self.config.dashboard, self.config.answer_seconds
        try:
            require_dashboard(address, seconds)
            return JobSubmissionClient(address)
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            raise ConfigError(f"launcher.dashboard={address}: no Ray dashboard answers there ({error})") from None


def require_dashboard(address: str, seconds: float) -> None:
    """Raises OSError if nothing answers at an address in time; Ray's client would wait forever."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=seconds).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # the dashboard requires a token, which Ray's client sends
            raise
