"""auricle pipeline: preprocess, targets, pretrain and evaluate as one chain; what stands already is not done again."""

from __future__ import annotations

import importlib

from launch.cli import request as job
from launch.config import RayConfig, SlurmConfig
from launch.launchers.status import require_ended
from launch.runs.job_record import read_note
from launch.workflows.pipeline import PipelineConfig, Step, split, steps
from launch.workflows.submit import DRY_RUN


def run(arguments: list[str]) -> int:
    """Exit code 0 where all is done or queued, otherwise that of the first step that failed."""
    own, given, launcher = split(arguments)
    request = job.read("pipeline", PipelineConfig, own, switches=(DRY_RUN,))
    if request is None:
        return 0
    chain = steps(request.config, given, [line for line in launcher if not line.startswith("-")])
    where = request.config.launcher
    queued = isinstance(where, SlurmConfig) or (isinstance(where, RayConfig) and bool(where.dashboard))
    if DRY_RUN not in request.switches:
        for step in chain:  # before anything is queued
            require_ended(step.folder())
    return _walk(chain, queued, DRY_RUN in request.switches)


def _walk(chain: list[Step], queued: bool, dry_run: bool) -> int:
    """Does, queues or shows what does not stand. What is queued waits for the one before: afterok."""
    after = before = ""
    for step in chain:
        why = f"comes after {before}" if before and (queued or dry_run) else step.why()
        name = step.folder().name
        print(f"== {name}: {why or 'stands, skipped'}", flush=True)
        if not why:
            continue
        before = name
        dependency = [f"launcher.after={after}"] if after else []
        print(step.command(), flush=True)
        module = importlib.import_module(f"launch.commands.{step.verb}")
        code: int = module.run([*step.arguments, *dependency, *[DRY_RUN] * dry_run])
        if code:
            return code
        if queued:
            after = f"JOB_OF_{name}" if dry_run else read_note(step.folder()).handle
    return 0
