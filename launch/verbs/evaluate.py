"""auricle evaluate: what frozen encoders know, with the baselines beside."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path

from data_pipeline.schema import ConfigError
from launch import send
from launch.config import EvaluateJob
from launch.verbs.targets import checkpoint_fingerprint
from pretrain.evaluate.config import EvaluateConfig

POLL_SECONDS = 10.0


KIND = EvaluateConfig


def run(arguments: list[str]) -> int:
    """Exit code 0 once every task is measured, or the job is queued; 2 for a bad config."""
    return send.run("evaluate", EvaluateJob, arguments)


def work(config: EvaluateConfig) -> None:
    """Measures, prints the table, and writes it where `out` says."""
    if config.follow:
        follow(config)
        return
    from launch.tables import show
    from pretrain.evaluate import report
    from pretrain.evaluate.run import evaluate

    rows = evaluate(config)
    show(report.table(rows))
    if config.out:
        report.write(rows, Path(config.out).expanduser())


def made_from(config: EvaluateConfig) -> dict[str, str]:
    """The checkpoints' weights and the list of the audio."""
    if config.follow:  # which may begin before there is a checkpoint
        return {}
    manifest = Path(config.manifest).expanduser()
    listed = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
    return {"manifest": listed, **checkpoint_fingerprint(config.checkpoint)}


def made(config: EvaluateConfig) -> dict[str, str]:
    """The results; without `out` nothing is kept, and so nothing stands."""
    file = Path(config.out).expanduser() / "results.json"
    if not config.out or not file.is_file():
        return {}
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def follow(config: EvaluateConfig) -> None:
    """Beside a run until its last step: each new checkpoint is evaluated once, without baselines."""
    from pretrain.checkpoint import read_state
    from pretrain.evaluate import report
    from pretrain.evaluate.encoders import find_checkpoint
    from pretrain.evaluate.projection import labelled_frames
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
            report.into_run(rows, run_folder, step, labelled_frames(config, str(newest)))
        if step >= steps:
            return
        time.sleep(POLL_SECONDS)
