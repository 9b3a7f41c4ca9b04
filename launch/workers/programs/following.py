"""Evaluates the checkpoints of a run while it trains: `auricle evaluate follow=true`."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from launch.runs.summary import last_activity
from pretrain.checkpointing.locate import saved_steps
from pretrain.evaluate import definitions
from pretrain.evaluate.config import EvaluateConfig, task_names

if TYPE_CHECKING:
    from pretrain.evaluate.frozen_encoders import FrozenEncoder

POLL_SECONDS = 10.0
"""Seconds between checks for a new checkpoint."""


class Saved(NamedTuple):
    """A checkpoint of a followed run, identified by step and checksum of the weights: a rollback repeats steps."""

    step: int
    weights: str
    steps: int
    folder: Path


def follow_checkpoints(config: EvaluateConfig) -> None:
    """Evaluates each checkpoint of a run, without baselines, until its last step or until the run ends.

    Checkpoints with results in RUN/evaluations.jsonl are not evaluated again.

    Raises:
        ConfigError: `checkpoint` is not one run folder.
        ValueError: A checkpoint cannot be used.
    """
    from pretrain.evaluate import report
    from pretrain.evaluate.evaluator import evaluate
    from pretrain.evaluate.projector import labelled_frames

    run_folder = Path(config.checkpoint).expanduser()
    if not (run_folder / "config.json").is_file() or "," in config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint}: with follow=true this must be one run folder")
    tasks = {definitions.title(task): task for task in task_names(config)}
    done: defaultdict[tuple[int, str], set[str]] = defaultdict(set)
    for row in read_rows(run_folder / "evaluations.jsonl"):
        done[row["step"], row.get("weights", "")].add(row["task"])
    sign, since = 0.0, time.monotonic()
    while True:
        if (newest := last_activity(run_folder)) != sign:
            sign, since = newest, time.monotonic()
        # before listing the checkpoints, so that the last one is not missed
        over = end_of(run_folder, time.monotonic() - since, config.follow_minutes)
        found = checkpoints(run_folder)
        due = [
            s for s in found if not done[s[:2]].issuperset(tasks) and (s.step % config.every == 0 or s.step >= s.steps)
        ]
        if not due:
            if over or (found and found[-1].step >= found[-1].steps):
                print(over or f"{run_folder}: all {found[-1].steps} steps are done", flush=True)
                return
            time.sleep(POLL_SECONDS)
            continue
        saved = due[0]  # the oldest, since it will be removed first
        encoder = opened(saved, config.device)
        if encoder is None:
            continue
        lacking = ",".join(task for title, task in tasks.items() if title not in done[saved[:2]])
        done[saved[:2]] |= set(tasks)
        measured = evaluate(
            replace(config, task=lacking, baselines=False, checkpoint=str(saved.folder)), encoders=[encoder]
        )
        frames = labelled_frames(config, encoder)
        if saved[:2] == read(saved.folder.with_name(f"unhealthy_{saved.folder.name}"))[:2]:
            print(f"step {saved.step}: the run has since rolled back past it; its result is dropped", flush=True)
            continue
        report.into_run(measured, run_folder, saved.step, frames, saved.weights)


def checkpoints(run_folder: Path) -> list[Saved]:
    """Returns the readable checkpoints of a run, by step."""
    return sorted(s for s in map(read, saved_steps(run_folder / "checkpoints").values()) if s.steps)


def read(folder: Path) -> Saved:
    """Reads a checkpoint; the result has 0 `steps` if it was removed in the meantime."""
    from pretrain.checkpointing.stored import read_state

    try:
        state = read_state(folder)
    except ValueError:
        return Saved(0, "", 0, folder)
    weights = state.get("sha256", {}).get("model.safetensors", "")
    return Saved(state["step"], weights, state["config"]["train"]["steps"], folder)


def opened(saved: Saved, device: str) -> FrozenEncoder | None:
    """Returns the encoder of a checkpoint; None if it was removed or replaced while being read."""
    from pretrain.evaluate.frozen_encoders import open_encoder

    try:
        encoder = open_encoder(str(saved.folder), device)
    except (OSError, ValueError):
        if read(saved.folder) == saved:
            raise
        return None
    return encoder if read(saved.folder) == saved else None


def end_of(run_folder: Path, silent_seconds: float, follow_minutes: float) -> str:
    """Returns the reason why no further checkpoint is expected; "" while one is."""
    if (run_folder / "UNHEALTHY").is_file():
        return f"{run_folder}: the run was stopped as unhealthy; it is no longer followed"
    if follow_minutes and silent_seconds > 60 * follow_minutes:
        return f"{run_folder}: no heartbeat for follow_minutes={follow_minutes:g}; it is no longer followed"
    return ""
