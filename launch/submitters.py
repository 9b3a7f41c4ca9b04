"""Launcher config -> submitter."""

from __future__ import annotations

from typing import Any

from data_pipeline.plan import accumulation
from data_pipeline.schema import load
from launch.config import LAUNCHERS, LocalConfig, PretrainJob, RayConfig, SlurmConfig
from launch.local import LocalSubmitter
from launch.ray import RayHere, RayJobs
from launch.slurm import SlurmSubmitter
from launch.submit import JobNote, Submitter


def for_job(job: PretrainJob) -> Submitter:
    """The submitter of a run. Raises ConfigError where the run cannot be cut into that many ranks."""
    submitter = make(job.launcher, job.engine.name, job.device)
    accumulation(job.data.micro_batches, submitter.processes)
    return submitter


def for_note(note: JobNote) -> Submitter:
    """The submitter that a run was given to."""
    return make(load(LAUNCHERS[note.launcher], note.config), "deepspeed", "auto")


def make(launcher: Any, engine: str, device: str) -> Submitter:
    """By the type of its config."""
    if isinstance(launcher, LocalConfig):
        return LocalSubmitter(launcher, engine, device)
    if isinstance(launcher, RayConfig):
        return RayJobs(launcher) if launcher.dashboard else RayHere(launcher)
    assert isinstance(launcher, SlurmConfig)
    return SlurmSubmitter(launcher)
