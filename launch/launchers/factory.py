"""Creates the submitter of a launcher config."""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.sampling.plan import accumulation
from launch.config import LAUNCHERS, LauncherConfig, LocalConfig, PretrainJob, RayConfig, SlurmConfig
from launch.launchers.base import Submitter
from launch.launchers.in_process import InProcess
from launch.launchers.local import LocalSubmitter
from launch.launchers.ray import RayHere, RayJobs
from launch.launchers.slurm import SlurmSubmitter
from launch.runs.job_record import JobRecord


def for_job(job: PretrainJob) -> Submitter:
    """Returns the submitter of a run.

    Raises:
        ConfigError: there are more ranks than micro-batches, or several for the server of a federated run, or devices
            where none can be started.
    """
    _require_devices(job)
    submitter = make(launcher_of(job), "pretrain", job.engine.name, job.device)
    if job.engine.name == "federated" and submitter.processes > 1:
        raise ConfigError(
            f"engine.name=federated: the server is one process, and launcher={job.launcher.name} starts "
            f"{submitter.processes}; ask for one node and one rank. Devices on other nodes reach it by SSH "
            "(docs/federated.md), or are Ray tasks: engine.federated.transport=ray"
        )
    accumulation(job.data.micro_batches, submitter.processes)
    return submitter


def _require_devices(job: PretrainJob) -> None:
    """Raises ConfigError if devices are to be started for another engine, as Ray tasks too, or on a varying node."""
    launcher = job.launcher
    if not isinstance(launcher, LocalConfig | SlurmConfig) or not launcher.devices:
        return
    given = f"launcher.devices={launcher.devices}"
    if job.engine.name != "federated":
        raise ConfigError(f"{given}: devices belong to engine.name=federated, and this run has {job.engine.name}")
    if job.engine.federated.transport == "ray":
        raise ConfigError(f"{given}: with engine.federated.transport=ray devices are Ray tasks; leave one of them out")
    if isinstance(launcher, SlurmConfig) and launcher.elastic:
        raise ConfigError(f"{given}: server and devices share one node; leave out launcher.elastic=true")


def launcher_of(job: PretrainJob) -> LauncherConfig:
    """Returns the launcher of a run with the number of cores that its ranks need, and one rank for a server."""
    launcher = job.launcher
    if isinstance(launcher, SlurmConfig):
        return launcher.with_cores(job.data.workers)
    if isinstance(launcher, RayConfig) and job.engine.name == "federated" and not launcher.workers:
        return replace(launcher, workers=1)
    return launcher


def for_record(note: JobRecord) -> Submitter:
    """Returns the submitter of an existing job, to query or end it; requires no GPU on this machine."""
    return make(load(LAUNCHERS[note.launcher], note.config), note.command, "deepspeed", "cpu")


def make(launcher: LauncherConfig, command: str, engine: str = "deepspeed", device: str = "auto") -> Submitter:
    """Returns the submitter for a launcher config.

    Args:
        launcher: LocalConfig, SlurmConfig or RayConfig.
        command: the command that runs in the job, such as "pretrain".
        engine: engine.name of a pretraining run.
        device: device of a pretraining run.

    Raises:
        ConfigError: the launcher cannot run this command.
    """
    if isinstance(launcher, SlurmConfig):
        return SlurmSubmitter(launcher, command)
    if isinstance(launcher, RayConfig):
        if launcher.dashboard:
            return RayJobs(launcher, command)
        if launcher.after:
            remedy = "needs launcher.dashboard; without it, jobs are driven from this process"
            raise ConfigError(f"launcher.after={launcher.after}: {remedy}")
        return RayHere(launcher) if command == "pretrain" else InProcess(launcher)
    if isinstance(launcher, LocalConfig):
        return LocalSubmitter(launcher, engine, device) if command == "pretrain" else InProcess(launcher)
    raise TypeError(f"{type(launcher).__name__} has no submitter")
