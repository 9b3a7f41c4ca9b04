"""auricle preprocess: raw audio in, shards out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.preprocess_config import PreprocessConfig
from data_pipeline.schema import ConfigError
from launch import job
from launch.config import LocalConfig, PreprocessJob, SlurmConfig
from launch.slurm import SlurmSubmitter
from launch.submit import write_note

DRY_RUN = "--dry-run"


def run(arguments: list[str]) -> int:
    """Exit code 0 where all is written (or the job is queued), 1 where something could not be, 2 for a bad config."""
    request = job.read("preprocess", PreprocessJob, arguments, switches=(DRY_RUN,))
    if request is None:
        return 0
    launcher = request.config.launcher
    if isinstance(launcher, SlurmConfig):
        return _submit(request.config, launcher, arguments, DRY_RUN in request.switches)
    if not isinstance(launcher, LocalConfig):
        raise ConfigError(f"launcher={launcher.name}: preprocessing runs on a Ray cluster by ray.address=, from here")
    fields = (field.name for field in dataclasses.fields(PreprocessConfig))
    config = PreprocessConfig(**{name: getattr(request.config, name) for name in fields})
    from data_pipeline.ray_jobs import plan_units, preprocess

    if DRY_RUN in request.switches:
        show(plan_units(config).rows())
        return 0
    summary = preprocess(config)
    show(summary.rows())
    if summary.problem:
        raise OSError(summary.problem)
    return 0


def _submit(config: PreprocessJob, launcher: SlurmConfig, arguments: list[str], dry_run: bool) -> int:
    """As a SLURM job that starts a Ray of its own; its folder is runs/preprocess_<name of out>."""
    overrides = [line for line in arguments if not line.startswith(("-", "launcher", "+launcher", "++launcher"))]
    submitter = SlurmSubmitter(launcher, overrides)
    folder = Path("runs") / f"preprocess_{Path(config.out).name}"
    if dry_run:
        print(submitter.plan(folder))
        return 0
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    handle = submitter.submit(folder)
    write_note(folder, handle, launcher)
    print(f"slurm job {handle}; auricle jobs status {folder} follows it, launcher.after={handle} can follow it")
    return 0


def show(rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)
