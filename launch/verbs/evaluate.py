"""auricle evaluate: what frozen encoders know, with the baselines beside."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from data_pipeline.schema import ConfigError
from launch import job
from pretrain.evaluate.config import EvaluateConfig

POLL_SECONDS = 10.0


def run(arguments: list[str]) -> int:
    """Exit code 0 once every task is measured, 2 for a bad config."""
    request = job.read("evaluate", EvaluateConfig, arguments)
    if request is None:
        return 0
    if request.config.follow:
        return follow(request.config)
    from launch.tables import show
    from pretrain.evaluate import report
    from pretrain.evaluate.run import evaluate

    rows = evaluate(request.config)
    show(report.table(rows))
    if request.config.out:
        report.write(rows, Path(request.config.out).expanduser())
    return 0


def follow(config: EvaluateConfig) -> int:
    """Beside a run until its last step: each new checkpoint is evaluated once, without baselines."""
    from pretrain.checkpoint import read_state
    from pretrain.evaluate import report
    from pretrain.evaluate.encoders import find_checkpoint
    from pretrain.evaluate.run import evaluate

    run_folder = Path(config.checkpoint).expanduser()
    if not (run_folder / "config.json").is_file() or "," in config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint}: with follow=true this must be one run folder")
    done: set[int] = set()
    while True:
        try:
            newest = find_checkpoint(str(run_folder))
            state = read_state(newest)
        except ValueError:  # nothing saved yet, or replaced while we looked
            time.sleep(POLL_SECONDS)
            continue
        step, steps = state["step"], state["config"]["train"]["steps"]
        if step not in done and (step % config.every == 0 or step >= steps):
            done.add(step)
            rows = evaluate(replace(config, checkpoint=str(newest), baselines=False))
            report.into_run(rows, run_folder, step)
        if step >= steps:
            return 0
        time.sleep(POLL_SECONDS)
