"""auricle pretrain: shards in, a checkpoint out."""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.schema import ConfigError
from launch import describe, job, local, progress
from launch.config import PretrainJob

STOPPED = 85
"""A worker's exit code when it saved a checkpoint and stopped on request."""
DRY_RUN = "--dry-run"


def run(arguments: list[str]) -> int:
    """Exit code: 0 all steps are done, 1 a rank failed, 2 bad config, 130 stopped with a checkpoint."""
    request = job.read("pretrain", PretrainJob, arguments, switches=(DRY_RUN,))
    if request is None:
        return 0
    config = request.config
    submitter = local.LocalSubmitter(config.launcher, config.engine.name, config.device)
    if config.data.micro_batches % submitter.processes:
        raise ConfigError(
            f"data.micro_batches={config.data.micro_batches}: must be divisible by the "
            f"{submitter.processes} ranks of launcher.processes"
        )
    folder = Path(config.runs) / config.name
    if DRY_RUN in request.switches:
        print(submitter.plan(folder))
        return 0
    describe.prepare(config)
    return attend(submitter, folder, config.train.steps)


def attend(submitter: local.LocalSubmitter, folder: Path, steps: int) -> int:
    """Starts the run, shows it, and returns its exit code. Ctrl-C asks for a checkpoint, a second one ends it."""
    handle = submitter.submit(folder)
    print(f"run folder {folder}; watch with: tensorboard --logdir {folder / 'tb'}", file=sys.stderr)

    def running() -> bool:
        return submitter.exit_code(handle) is None

    try:
        try:
            progress.follow(folder, steps, running)
        except KeyboardInterrupt:
            print("\nsaving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
            submitter.ask_to_stop(handle)
            progress.follow(folder, steps, running)
    except KeyboardInterrupt:
        submitter.cancel(handle)
        raise
    finally:
        submitter.cancel(handle)
    return _verdict(submitter.exit_code(handle) or 0, folder, steps)


def _verdict(code: int, folder: Path, steps: int) -> int:
    latest = folder / "checkpoints" / "latest"
    saved = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
    done = int(saved.rpartition("_")[2]) if saved else 0
    if code == STOPPED:
        print(f"stopped after step {done}; the same command continues from {folder / 'checkpoints' / saved}")
        return 130
    if code == 0 and done >= steps:
        print(f"done: {folder / 'checkpoints' / saved}")
        return 0
    print(local.failure_report(folder), file=sys.stderr)
    ending = f"ended with exit code {code}" if code else f"ended after step {done} of {steps}"
    print(f"auricle pretrain: the run {ending}; all logs are in {folder / 'logs'}", file=sys.stderr)
    return 2 if code == 2 else 1
