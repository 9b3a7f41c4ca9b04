"""The whole chain as command lines: preprocess → targets → pretrain → evaluate, wired together below one folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_pipeline.core.schema import ConfigError, about, config
from launch.cli import request as job
from launch.config import EvaluateJob, Launcher, LocalConfig, PreprocessJob, PretrainJob, TargetsJob
from launch.runs import metadata
from launch.workers import task
from pretrain.checkpointing.locate import remedy, steps_done

JOBS: dict[str, type[Any]] = {
    "preprocess": PreprocessJob,
    "targets": TargetsJob,
    "pretrain": PretrainJob,
    "evaluate": EvaluateJob,
}
"""The verbs of a chain, in their order."""
LABELS = "units"
"""What the training knows its labels as."""
MFCC_HZ = 100.0


@config
class PipelineConfig:
    """A chain of jobs: the root of conf/pipeline.yaml. VERB.field=value, such as pretrain.seed=3, goes to that verb."""

    folder: Annotated[str, about("shards, labels, runs and evaluation are made below it", min_length=1)]
    steps: Annotated[
        tuple[str, ...],
        about("which steps; targets are made only where the objective takes labels from outside", min_length=1),
    ] = tuple(JOBS)
    launcher: Launcher = LocalConfig()


@dataclass(frozen=True)
class Step:
    """One command line of the chain."""

    verb: str
    arguments: tuple[str, ...]

    def command(self) -> str:
        """As a shell line."""
        return shlex.join(["auricle", self.verb, *self.arguments])

    def job(self) -> Any:
        """Its config. Raises ConfigError."""
        request = job.read(self.verb, JOBS[self.verb], list(self.arguments))
        assert request is not None
        return request.config

    def folder(self) -> Path:
        """Its run folder."""
        found = self.job()
        return metadata.folder_of(found) if self.verb == "pretrain" else task.folder_of(self.verb, found)

    def why(self) -> str:
        """Why it has to run (again); empty where its result stands, read again and compared."""
        found = self.job()
        return pretraining_why(found) if self.verb == "pretrain" else task.stands(self.verb, found)


def split(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """The chain's own arguments, those of each verb, and those of the launcher, which all have in common."""
    own: list[str] = []
    launcher: list[str] = []
    given: dict[str, list[str]] = {verb: [] for verb in JOBS}
    for line in arguments:
        sign = line[: len(line) - len(line.lstrip("+~"))]
        verb, dot, rest = line[len(sign) :].partition(".")
        if dot and verb in JOBS and "=" not in verb:
            given[verb].append(sign + rest)
        else:
            own.append(line)
            if verb.partition("=")[0] == "launcher":
                launcher.append(line)
    return own, given, launcher


def steps(settings: PipelineConfig, given: Mapping[str, list[str]], launcher: list[str]) -> list[Step]:
    """The command lines. Raises ConfigError for a step that does not exist and for a wrong field of any verb."""
    if wrong := [verb for verb in settings.steps if verb not in JOBS]:
        raise ConfigError(f"steps: there is no {wrong[0]}; there are: {', '.join(JOBS)}")
    root = Path(settings.folder)
    shards, labels, runs = root / "shards", root / "labels", root / "runs"

    def step(verb: str, *wiring: str) -> Step:
        name = [] if verb == "pretrain" else [f"name={verb}"]
        return Step(verb, (f"runs={runs}", *name, *launcher, *wiring, *given[verb]))

    preprocess, targets = step("preprocess", f"out={shards}"), step("targets", f"shards={shards}", f"out={labels}")
    pretrain = step("pretrain", f"data.shards={shards}")
    run: PretrainJob = pretrain.job()
    training, wants_labels = [pretrain], "targets" in settings.steps and hasattr(run.objective, "labels")
    if getattr(run, "chain", None):
        training, wants_labels = _chained(pretrain, run), False
    elif wants_labels:
        made: TargetsJob = targets.job()
        wiring = [f"objective.labels={LABELS}", f"data.targets.{LABELS}={labels}", f"objective.units={made.classes}"]
        wiring += [f"objective.label_rate_hz={MFCC_HZ}"] if made.features == "mfcc" else []
        training = [step("pretrain", f"data.shards={shards}", *wiring)]
    evaluate = step("evaluate", f"checkpoint={training[-1].folder()}", f"out={root / 'evaluation'}")
    found = [preprocess, *([targets] if wants_labels else []), *training, evaluate]
    chosen = [one for one in found if one.verb in settings.steps]
    for one in chosen:
        one.job()
    return chosen


def _chained(pretrain: Step, run: PretrainJob) -> list[Step]:
    from launch.workflows import iterations

    return [Step(link.verb, link.arguments) for link in iterations.links(run, list(pretrain.arguments))]


def pretraining_why(run: PretrainJob) -> str:
    """Why a pretraining has to run (again); empty where its last checkpoint is whole, of this config and these data.

    Raises ConfigError where it is damaged: to train once more would change nothing, since all steps are done.
    """
    from data_pipeline.loader.reader import open_reader
    from pretrain.checkpointing import checkpoint, resume

    folder = metadata.folder_of(run)
    done = steps_done(folder)
    if done < run.train.steps:
        return f"is at step {done} of {run.train.steps}"
    newest = folder / "checkpoints" / f"step_{done:08d}"
    if damaged := checkpoint.damage(newest):
        raise ConfigError(f"{damaged}; {remedy(newest.parent)}")
    state = checkpoint.read_state(newest)
    resume.require_same_config(state["config"], metadata.run_config(run), newest)
    reader = open_reader(run.data, run.seed, 0, 1)
    try:
        same = state["cursor"]["plan_hash"] == reader.plan_hash
    finally:
        reader.close()
    return "" if same else "was made from other shards or labels"
