"""Runs a job on a SLURM cluster. All values reach sbatch as arguments; none becomes part of a shell script."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from launch.config import DEFAULT_CORES, SLURM_JOB_ID, SlurmConfig
from launch.launchers.base import State

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = {
    "pretrain": "pretrain.sbatch",
    "preprocess": "ray.sbatch",
    "targets": "ray.sbatch",
    "evaluate": "evaluate.sbatch",
}
"""Command -> its batch script."""
STATES: dict[str, State] = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "SUSPENDED": "waiting",
    "RUNNING": "running",
    "COMPLETING": "running",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
}
"""SLURM's job states; all others (FAILED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY …) are failures."""


NO_CLUSTER = "is this machine part of a cluster? SLURM_CONF names its configuration"
"""Remedy where the commands of SLURM find no configuration."""


class SlurmError(RuntimeError):
    """A SLURM command failed; the message is SLURM's own."""


class SlurmSubmitter:
    """Submits a command's batch script (slurm/*.sbatch); the handle is the id of the job.

    Args:
        config: nodes, limits and options of the job.
        command: the command that runs in the job.
    """

    def __init__(self, config: SlurmConfig, command: str = "pretrain") -> None:
        self.config = config
        self.script = TEMPLATES / SCRIPTS[command]
        self.processes = config.nodes * config.ranks_per_node

    def command(self, folder: Path, runs: Sequence[Path] = ()) -> list[str]:
        """Returns the sbatch command line.

        Args:
            folder: the run folder; for a sweep, the common prefix of its run folders.
            runs: the run folders of a sweep, which is submitted as a job array; each name ends with its index.
        """
        c = self.config
        log = (
            str(folder.absolute()).replace("%", "%%") + "_%a" * bool(runs) + "/logs/slurm.log"
        )  # sbatch expands fields such as %j
        alone = self.script.name == SCRIPTS["evaluate"]  # one process
        pretraining = self.script.name == SCRIPTS["pretrain"]
        elastic = c.elastic and pretraining
        cores = c.cpus_per_task or DEFAULT_CORES
        gpus = min(1, c.gpus_per_node) if alone else c.gpus_per_node
        options = {
            "job-name": folder.name,
            "nodes": 1 if alone else f"1-{c.nodes}" if elastic else c.nodes,
            # with a number of tasks, sbatch takes the fewest nodes of a range; the script gets --ranks-per-node instead
            "ntasks-per-node": "" if elastic else c.ranks_per_node + c.devices if pretraining else 1,
            "cpus-per-task": cores,
            "mincpus": c.ranks_per_node * cores if elastic else "",
            "time": c.minutes,
            "signal": f"B:USR1@{c.warn_seconds}" if not alone else "",
            "array": f"0-{len(runs) - 1}" + f"%{c.parallel}" * bool(c.parallel) if runs else "",
            "output": log,
            "gres": f"gpu:{gpus}" if gpus else "",
            "mem": f"{c.memory_gb}G" if c.memory_gb else "",
            "partition": c.partition,
            "account": c.account,
            "qos": c.qos,
            "constraint": c.constraint,
            "exclude": c.exclude,
            "dependency": f"afterok:{c.after}" if c.after else "",
            "kill-on-invalid-dep": "yes" if c.after else "",
        }
        given = [f"--{name}={value}" for name, value in options.items() if value != ""]
        given += [f"--{name}={value}" if value else f"--{name}" for name, value in sorted(c.options.items())]
        folders = [str(run.absolute()) for run in runs or (folder,)]
        return [
            "sbatch",
            "--parsable",
            *given,
            str(self.script),
            *self._script_arguments(),
            *["--"] * bool(runs),
            *folders,
        ]

    def _script_arguments(self) -> list[str]:
        c = self.config
        arguments = ["--python", c.python or sys.executable, "--retries", str(c.retries)]
        if c.elastic and self.script.name == SCRIPTS["pretrain"]:
            arguments += ["--ranks-per-node", str(c.ranks_per_node)]
        if c.devices and self.script.name == SCRIPTS["pretrain"]:
            arguments += ["--devices", str(c.devices)]
        for module in c.modules:
            arguments += ["--module", module]
        if c.container != "none":
            arguments += ["--container", c.container, "--image", c.image, "--mounts", c.mounts]
        return arguments

    def plan(self, folder: Path, runs: Sequence[Path] = ()) -> str:
        """Returns the command and the script that it submits."""
        command = shlex.join(self.command(folder, runs))
        return f"{command}\n\n# {self.script}\n{self.script.read_text(encoding='utf-8')}"

    def submit(self, folder: Path, runs: Sequence[Path] = ()) -> str:
        """Submits the job and returns its id.

        Raises:
            SlurmError: sbatch failed.
            ConfigError: SLURM cannot write to the path of the run folder.
        """
        if "\\" in str(folder.absolute()):
            raise ConfigError(f"{folder.absolute()}: SLURM cannot write into folders with a backslash in their path")
        return require_job_id(ask(*self.command(folder, runs)).strip().split(";")[0])

    def status(self, handle: str) -> State:
        """Returns the state of a job, `failed` also for one that SLURM no longer knows. Raises SlurmError."""
        return STATES.get(job_state(handle), "failed")

    def cancel(self, handle: str) -> None:
        """Ends the job; its ranks get SIGTERM, and the cluster's KillWait to save a checkpoint."""
        ask("scancel", "--", require_job_id(handle))


def require_job_id(handle: str) -> str:
    """Returns `handle` if it is the id of a SLURM job. Raises SlurmError otherwise.

    An option of scancel, such as --user=root, or a list of ids would end other jobs.
    """
    if not SLURM_JOB_ID.fullmatch(handle):
        raise SlurmError(f"handle={handle!r}: must be the id of a SLURM job, such as 1234 or 1234_5; nothing was done")
    return handle


def job_state(job: str) -> str:
    """Returns SLURM's state of a job, "" for one that it no longer knows. Raises SlurmError without an answer."""
    require_job_id(job)
    state = _job_fields(job).get("JobState", "")
    if not state:
        for source in ((), ("-c",)):  # accounting database, or job completion file
            try:
                rows = ask("sacct", *source, "-n", "-P", "-X", f"--jobs={job}", "--format=State").splitlines()
            except SlurmError:
                continue
            state = rows[-1].split(" ")[0] if rows else ""
            if state:
                break
    return state


def _job_fields(job: str) -> dict[str, str]:
    try:
        text = ask("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return {}
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def ask(*command: str) -> str:
    """Runs a SLURM command and returns its output. Raises SlurmError if it fails or takes more than a minute."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            env=_environment(),
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here: run auricle on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within a minute") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        remedy = f"; {NO_CLUSTER}" if "configuration source" in reason else ""
        raise SlurmError(f"{_shown(command)}: {reason}{remedy}")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    return shlex.join(command) if len(command) < 8 else command[0]


def _environment() -> dict[str, str]:
    """Returns the environment without the variables of a surrounding job, which sbatch would treat as options."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SBATCH_", "SLURM_")) or name in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    }
