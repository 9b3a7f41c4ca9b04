"""Launcher config -> submitter."""

from __future__ import annotations

from typing import Any

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.sampling.plan import accumulation
from launch.config import LAUNCHERS, LocalConfig, PretrainJob, RayConfig, SlurmConfig
from launch.launchers.base import Submitter
from launch.launchers.in_process import Foreground
from launch.launchers.local import LocalSubmitter
from launch.launchers.ray import RayHere, RayJobs
from launch.launchers.slurm import SlurmSubmitter
from launch.runs.job_record import JobRecord


def for_job(job: PretrainJob) -> Submitter:
    """The submitter of a run. Raises ConfigError where the run cannot be cut into that many ranks."""
    submitter = make(job.launcher, "pretrain", job.engine.name, job.device)
    accumulation(job.data.micro_batches, submitter.processes)
    return submitter


def for_record(note: JobRecord) -> Submitter:
    """The submitter that a job was given to, to ask after it or to end it: that needs no GPU here."""
    return make(load(LAUNCHERS[note.launcher], note.config), note.command, "deepspeed", "cpu")


def make(launcher: Any, verb: str, engine: str = "deepspeed", device: str = "auto") -> Submitter:
    """By the type of its config. Raises ConfigError for a launcher that cannot do what it is asked to."""
    if isinstance(launcher, SlurmConfig):
        return SlurmSubmitter(launcher, verb)
    if isinstance(launcher, RayConfig) and launcher.dashboard:
        return RayJobs(launcher, verb)
    if isinstance(launcher, RayConfig) and launcher.after:
        raise ConfigError(f"launcher.after={launcher.after}: needs launcher.dashboard; without, jobs run from here")
    if verb != "pretrain":
        return Foreground(launcher)
    if isinstance(launcher, LocalConfig):
        return LocalSubmitter(launcher, engine, device)
    return RayHere(launcher)
