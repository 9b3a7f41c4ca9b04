"""Launcher config -> submitter."""

from __future__ import annotations

from typing import Any

from data_pipeline.schema import ConfigError, load
from launch.config import LAUNCHERS, LocalConfig, PretrainJob, SlurmConfig
from launch.local import LocalSubmitter
from launch.slurm import SlurmSubmitter
from launch.submit import JobNote, Submitter


def for_job(job: PretrainJob) -> Submitter:
    """The submitter of a run. Raises ConfigError where the run cannot be cut into that many ranks."""
    submitter = make(job.launcher, job.engine.name, job.device)
    if job.data.micro_batches % submitter.processes:
        raise ConfigError(
            f"data.micro_batches={job.data.micro_batches}: must be divisible by the {submitter.processes} ranks that "
            f"the launcher ({job.launcher.name}) would start"
        )
    return submitter


def for_note(note: JobNote) -> Submitter:
    """The submitter that a run was given to."""
    return make(load(LAUNCHERS[note.launcher], note.config), "deepspeed", "auto")


def make(launcher: Any, engine: str, device: str) -> Submitter:
    """By the type of its config."""
    if isinstance(launcher, LocalConfig):
        return LocalSubmitter(launcher, engine, device)
    assert isinstance(launcher, SlurmConfig)
    return SlurmSubmitter(launcher)
