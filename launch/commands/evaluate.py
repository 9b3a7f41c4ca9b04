"""auricle evaluate: what frozen encoders know, with the baselines beside."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.core.schema import ConfigError
from launch.config import EvaluateJob
from launch.runs.summary import rows, signs_of_life
from launch.workflows import submit
from pretrain.evaluate.config import EvaluateConfig
from pretrain.interop.fingerprint import checkpoint_fingerprint

if TYPE_CHECKING:
    from pretrain.evaluate.frozen_encoders import FrozenEncoder

POLL_SECONDS = 10.0


KIND = EvaluateConfig


def run(arguments: list[str]) -> int:
    """Exit code 0 once every task is measured, or the job is queued; 2 for a bad config."""
    return submit.run("evaluate", EvaluateJob, arguments)


def work(config: EvaluateConfig) -> None:
    """Measures, prints the table, and writes it where `out` says."""
    if config.follow:
        follow(config)
        return
    from launch.cli.tables import show
    from pretrain.evaluate import report
    from pretrain.evaluate.evaluator import evaluate

    measured = evaluate(config)
    show(report.table(measured))
    if config.out:
        report.write(measured, Path(config.out).expanduser())


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


class Saved(NamedTuple):
    """A checkpoint of a run that is followed; known by its step and weights, for a roll-back does steps anew."""

    step: int
    weights: str
    steps: int
    folder: Path


def follow(config: EvaluateConfig) -> None:
    """Beside a run until its last step, or until it is over before: each checkpoint is evaluated, without baselines.

    What RUN/evaluations.jsonl has already is not measured again. Raises ValueError for an unusable checkpoint.
    """
    from pretrain.evaluate import report
    from pretrain.evaluate.evaluator import evaluate
    from pretrain.evaluate.projector import labelled_frames

    run_folder = Path(config.checkpoint).expanduser()
    if not (run_folder / "config.json").is_file() or "," in config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint}: with follow=true this must be one run folder")
    tasks = [name.strip() for name in config.task.split(",")]
    done: defaultdict[tuple[int, str], set[str]] = defaultdict(set)
    for row in rows(run_folder, "evaluations.jsonl"):
        done[row["step"], row.get("weights", "")].add(row["task"])
    sign, since = 0.0, time.monotonic()
    while True:
        if (newest := signs_of_life(run_folder)) != sign:
            sign, since = newest, time.monotonic()
        over = end_of(run_folder, time.monotonic() - since, config.follow_minutes)  # before looking what is there
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
        saved = due[0]  # the oldest: it is the next to be removed
        encoder = opened(saved, config.device)
        if encoder is None:
            continue
        lacking = ",".join(task for task in tasks if task not in done[saved[:2]])
        done[saved[:2]] |= set(tasks)
        measured = evaluate(replace(config, task=lacking, baselines=False), encoders=[encoder])
        frames = labelled_frames(config, encoder)
        if saved[:2] == read(saved.folder.with_name(f"unhealthy_{saved.folder.name}"))[:2]:
            print(f"step {saved.step}: the run has rolled back from there meanwhile; not counted", flush=True)
            continue
        report.into_run(measured, run_folder, saved.step, frames, saved.weights)


def checkpoints(run_folder: Path) -> list[Saved]:
    """Those of a run that can be read just now, by step."""
    return sorted(s for s in map(read, (run_folder / "checkpoints").glob("step_*")) if s.steps)


def read(folder: Path) -> Saved:
    """A checkpoint; one of no steps where none is there (any more)."""
    from pretrain.checkpointing.checkpoint import read_state

    try:
        state = read_state(folder)
    except ValueError:
        return Saved(0, "", 0, folder)
    weights = state.get("sha256", {}).get("model.safetensors", "")
    return Saved(state["step"], weights, state["config"]["train"]["steps"], folder)


def opened(saved: Saved, device: str) -> FrozenEncoder | None:
    """Its encoder; None where it was removed or replaced before it was read."""
    from pretrain.evaluate.frozen_encoders import open_encoder

    try:
        encoder = open_encoder(str(saved.folder), device)
    except (OSError, ValueError):
        if read(saved.folder) == saved:
            raise
        return None
    return encoder if read(saved.folder) == saved else None


def end_of(run_folder: Path, silent_seconds: float, follow_minutes: float) -> str:
    """Why nothing more is to be expected of a run; empty while something is."""
    if (run_folder / "UNHEALTHY").is_file():
        return f"{run_folder}: the run was stopped as unhealthy; not followed any further"
    if follow_minutes and silent_seconds > 60 * follow_minutes:
        return f"{run_folder}: no sign of life for follow_minutes={follow_minutes:g}; not followed any further"
    return ""
