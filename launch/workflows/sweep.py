"""Sweeps (Hydra's multirun): one run per combination of listed values, an array on SLURM, in sequence elsewhere.

auricle pretrain … optimizer.lr=1e-4,3e-4 seed=1,2 --multirun      # NAME_0 … NAME_3
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import visible
from launch.cli import request
from launch.cli.compose import sweep
from launch.cli.request import MULTIRUN
from launch.config import PretrainJob, SlurmConfig
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.slurm import SlurmSubmitter
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import write_record
from launch.workflows import inputs
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES


def run(arguments: list[str], one: Callable[[list[str]], int]) -> int:
    """Runs every combination; a failed run does not prevent the later ones.

    Args:
        arguments: the command line, with MULTIRUN.
        one: pretrains one command line and returns its exit code.

    Returns:
        0 if all runs are done or queued, 1 if one failed, 130 if Ctrl-C stopped one.

    Raises:
        ConfigError: no override lists several values, or the first combination is wrong.
    """
    switches = [argument for argument in arguments if argument.startswith("-") and argument != MULTIRUN]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    points = sweep(overrides)
    lines = [[*point, *switches] for point in points]
    first = request.read("pretrain", PretrainJob, lines[0], switches=SWITCHES)
    if first is None:
        return ExitCode.DONE
    names = [f"{first.config.name}_{number}" for number in range(len(points))]
    lines = [[*line, f"name={name}"] for line, name in zip(lines, names, strict=True)]
    for name, point in zip(names, points, strict=True):
        print(f"{name}: {' '.join(line for line in point if line not in overrides)}", flush=True)
    factory.for_job(first.config)  # raises ConfigError if no run of the sweep could start
    launcher = first.config.launcher
    if isinstance(launcher, SlurmConfig) and PREPARE not in switches:
        return _array(first.config, launcher, lines, DRY_RUN in switches)
    failed: dict[str, str] = {}
    for name, line in zip(names, lines, strict=True):
        try:
            code = one(line)
            reason = f"exit code {int(code)}" if code else ""
        except (ValueError, OSError) as error:
            code, reason = ExitCode.FAILED, str(error)
            print(f"{name}: {visible(reason)}", file=sys.stderr, flush=True)
        if code == ExitCode.INTERRUPTED:  # Ctrl-C ends the whole sweep
            return code
        if reason:
            failed[name] = reason.partition("\n")[0]
    for name, reason in failed.items():
        print(f"failed: {name} ({visible(reason)})", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(lines)} runs of the sweep failed", file=sys.stderr, flush=True)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _array(first: PretrainJob, launcher: SlurmConfig, lines: list[list[str]], dry_run: bool) -> int:
    """Submits the runs as one SLURM array. Raises ConfigError if they cannot share one."""
    given = (request.read("pretrain", PretrainJob, line, switches=SWITCHES) for line in lines)
    jobs = [one.config for one in given if one]
    for job in jobs:
        factory.for_job(job)  # raises ConfigError if the ranks cannot share the micro-batches
        if job.launcher != launcher or job.runs != first.runs or job.chain:
            raise ConfigError("--multirun: the runs of an array share launcher and runs folder, and have no chain")
    request.print_cautions(*jobs)
    base = metadata.folder_of(first)
    folders = [metadata.folder_of(job) for job in jobs]
    launcher = launcher.with_cores(max(job.data.workers for job in jobs))
    submitter = SlurmSubmitter(launcher)
    if dry_run:
        print(submitter.plan(base, folders))
        return ExitCode.DONE
    for folder in folders:
        require_ended(folder)
    for job in jobs:
        inputs.require_startable(job, attended=False)
    for job in jobs:
        metadata.prepare(job)
    handle = submitter.submit(base, folders)
    for number, folder in enumerate(folders):
        write_record(folder, f"{handle}_{number}", launcher)
    print(f"slurm array {handle} of {len(folders)} runs; `auricle jobs list --runs {_shown(base.parent)}` lists them")
    return ExitCode.DONE


def _shown(path: Path) -> str:
    return shlex.quote(str(path))
