"""Sweeps, Hydra's multirun: one run per combination of listed values, an array on SLURM, one after the other elsewhere.

auricle pretrain … optimizer.lr=1e-4,3e-4 seed=1,2 --multirun      # NAME_0 … NAME_3
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from launch.cli import request as job
from launch.cli.compose import sweep
from launch.config import PretrainJob
from launch.launchers import factory
from launch.launchers.slurm import SlurmSubmitter
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import write_note
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES

MULTIRUN = "--multirun"


def run(arguments: list[str], one: Callable[[list[str]], int]) -> int:
    """Exit code of the first run that fails, 0 where all are done or queued. `one` pretrains one command line."""
    switches = [argument for argument in arguments if argument.startswith("-") and argument != MULTIRUN]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    points = sweep(overrides)
    lines = [[*point, *switches] for point in points]
    first = job.read("pretrain", PretrainJob, lines[0], switches=SWITCHES)
    if first is None:
        return 0
    names = [f"{first.config.name}_{number}" for number in range(len(points))]
    lines = [[*line, f"name={name}"] for line, name in zip(lines, names, strict=True)]
    for name, point in zip(names, points, strict=True):
        print(f"{name}: {' '.join(line for line in point if line not in overrides)}", flush=True)
    if isinstance(factory.for_job(first.config), SlurmSubmitter) and PREPARE not in switches:
        return _array(first.config, lines, DRY_RUN in switches)
    for line in lines:
        if code := one(line):
            return code
    return 0


def _array(first: PretrainJob, lines: list[list[str]], dry_run: bool) -> int:
    jobs = [request.config for line in lines if (request := job.read("pretrain", PretrainJob, line, switches=SWITCHES))]
    for one in jobs:
        factory.for_job(one)  # refuses what cannot be cut into that many ranks
        if one.launcher != first.launcher or one.runs != first.runs or getattr(one, "chain", None):
            raise ConfigError("--multirun: the runs of an array share launcher and runs folder, and have no chain")
    base = metadata.folder_of(first)
    folders = [metadata.folder_of(one) for one in jobs]
    submitter = SlurmSubmitter(first.launcher)
    if dry_run:
        print(submitter.plan(base, folders))
        return 0
    for folder in folders:
        require_ended(folder)
    for one in jobs:
        metadata.prepare(one)
    handle = submitter.submit(base, folders)
    for number, folder in enumerate(folders):
        write_note(folder, f"{handle}_{number}", first.launcher)
    print(f"slurm array {handle} of {len(folders)} runs; auricle jobs list --runs {_shown(base.parent)} follows them")
    return 0


def _shown(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
