"""Runs preprocess → targets → pretrain → evaluate as command lines whose inputs and outputs are below one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, about, config, hint
from data_pipeline.labels.pitch_targets import PITCH
from launch.cli import request
from launch.config import (
    JOB_TYPES,
    Launcher,
    LocalConfig,
    PreprocessJob,
    PretrainJob,
    ProgramJob,
    TargetsJob,
)
from launch.exit_codes import ExitCode
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import read_record
from launch.workers import task
from launch.workflows import inputs, iterations, pretraining, submit
from launch.workflows.iterations import LABELS
from launch.workflows.submit import DRY_RUN
from pretrain.checkpointing.locate import remedy, steps_done

COMMANDS = ("preprocess", "targets", "pretrain", "evaluate")
"""The commands of a pipeline, in order."""


@config
class PipelineConfig:
    """The root of conf/pipeline.yaml. COMMAND.field=value, as in pretrain.seed=3, sets a field of that command."""

    folder: Annotated[str, about("shards, labels, runs and evaluation are written below it", min_length=1)]
    steps: Annotated[
        tuple[str, ...],
        about(
            "steps to run; targets only if the objective accepts frame labels from the data",
            min_length=1,
        ),
    ] = COMMANDS
    launcher: Launcher = LocalConfig()


@dataclass(frozen=True)
class PipelineStep:
    """One command line of a pipeline."""

    command: str
    arguments: tuple[str, ...]

    def job(self) -> PretrainJob | ProgramJob:
        """Returns the step's config. Raises ConfigError."""
        if self.command == "pretrain":
            return request.config_of(self.command, PretrainJob, self.arguments)
        return request.config_of(self.command, JOB_TYPES[self.command], self.arguments)

    def folder(self) -> Path:
        """Returns the step's run folder."""
        job = self.job()
        return metadata.folder_of(job) if isinstance(job, PretrainJob) else task.folder_of(self.command, job)

    def why(self) -> str:
        """Returns the reason why the step must run (again); "" if its result, which is read again, is up to date."""
        job = self.job()
        return why_pretraining(job) if isinstance(job, PretrainJob) else task.why_outdated(self.command, job)

    def run(self, more: list[str]) -> int:
        """Runs the step with additional arguments; returns the exit code."""
        if self.command == "pretrain":
            return pretraining.run([*self.arguments, *more])
        return submit.run(self.command, [*self.arguments, *more])


def run(arguments: list[str]) -> int:
    """Runs, queues or shows the steps that are not up to date.

    Returns:
        0 if all steps are done or queued, otherwise the exit code of the first step that failed.

    Raises:
        ConfigError: a field of the pipeline or of any step is wrong, or an input is missing.
    """
    own, given, launcher = split(arguments)
    parsed = request.read("pipeline", PipelineConfig, own, switches=(DRY_RUN,))
    if parsed is None:
        return ExitCode.DONE
    chain = steps(parsed.config, given, [line for line in launcher if not line.startswith("-")])
    require_step_inputs(chain)
    queued, dry_run = parsed.config.launcher.queued, DRY_RUN in parsed.switches
    if not dry_run:
        for step in chain:  # before the first step starts
            require_ended(step.folder())
    return _run_steps(chain, queued, dry_run)


def _run_steps(chain: list[PipelineStep], queued: bool, dry_run: bool) -> int:
    """Runs, queues or shows each step that is not up to date. A queued step waits until the previous one succeeded."""
    after = before = ""
    for step in chain:
        why = f"comes after {before}" if before and (queued or dry_run) else step.why()
        name = step.folder().name
        print(f"== {name}: {why or 'up to date, skipped'}", flush=True)
        if not why:
            continue
        before = name
        dependency = [f"launcher.after={after}"] if after else []
        print(request.shell_line(step.command, step.arguments), flush=True)
        if code := step.run([*dependency, *[DRY_RUN] * dry_run]):
            return code
        if queued:
            after = f"JOB_OF_{name}" if dry_run else read_record(step.folder()).handle
    return ExitCode.DONE


def split(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Returns the pipeline's arguments, the arguments by command, and those of the launcher, which all share."""
    own: list[str] = []
    launcher: list[str] = []
    given: dict[str, list[str]] = {command: [] for command in COMMANDS}
    for line in arguments:
        sign = line[: len(line) - len(line.lstrip("+~"))]
        command, dot, rest = line[len(sign) :].partition(".")
        if dot and command in COMMANDS and "=" not in command:
            given[command].append(sign + rest)
        else:
            own.append(line)
            if command.partition("=")[0] == "launcher":
                launcher.append(line)
    return own, given, launcher


def steps(settings: PipelineConfig, given: Mapping[str, list[str]], launcher: list[str]) -> list[PipelineStep]:
    """Returns the steps in order, after checking the config of each.

    Args:
        settings: folder, steps and recipe of the pipeline.
        given: overrides of each step, by command.
        launcher: overrides of the launcher, for all steps.

    Raises:
        ConfigError: a step does not exist, or a field of any step is wrong.
    """
    if wrong := [name for name in settings.steps if name not in COMMANDS]:
        near, listed = hint(wrong[0], COMMANDS), ", ".join(COMMANDS)
        raise ConfigError(f"steps: there is no step {wrong[0]!r}{near}; there are: {listed}")
    root = Path(settings.folder)
    shards, labels, runs = root / "shards", root / "labels", root / "runs"

    def step(command: str, *wiring: str) -> PipelineStep:
        name = [] if command == "pretrain" else [f"name={command}"]
        return PipelineStep(command, (f"runs={runs}", *name, *launcher, *wiring, *given[command]))

    preprocess = step("preprocess", f"out={shards}")
    split = request.config_of("preprocess", PreprocessJob, preprocess.arguments).split
    shards, valid = (shards / "train", shards / "valid") if split.enabled else (shards, None)
    data = [f"data.shards={shards}"]
    targets = step("targets", f"shards={shards}", f"out={labels}")
    pretrain = step("pretrain", *data)
    run_config = request.config_of("pretrain", PretrainJob, pretrain.arguments)
    labelling = [targets]
    training, wants_labels = [pretrain], "targets" in settings.steps and run_config.objective.accepts_frame_labels
    if run_config.chain:
        links = iterations.links(run_config, list(pretrain.arguments))
        training, wants_labels = [PipelineStep(link.command, link.arguments) for link in links], False
    elif wants_labels:
        made = request.config_of("targets", TargetsJob, targets.arguments)
        wiring = [f"objective.labels={LABELS}", f"data.targets.{LABELS}={made.out}", f"objective.units={made.classes}"]
        wiring += [f"objective.label_rate_hz={made.rate_hz}"] if made.features == "mfcc" else []
        if split.valid and not run_config.data.valid:
            held_out = root / "labels-valid"
            centres = [f"kmeans={made.out}"] if made.features != PITCH else []
            own = ["name=targets-valid", f"shards={valid}", f"out={held_out}", *centres]
            labelling.append(PipelineStep("targets", (*targets.arguments, *own)))
            wiring += [f"data.valid={valid}", f"data.valid_targets.{LABELS}={held_out}"]
        training = [step("pretrain", *data, *wiring)]
    elif split.valid and not run_config.objective.frame_labels:
        training = [step("pretrain", *data, f"data.valid={valid}")]
    if split.valid and not request.config_of("pretrain", PretrainJob, training[-1].arguments).data.valid:
        print(
            f"note: {valid} is not read: the run needs pretrain.data.valid, and frame labels in "
            "pretrain.data.valid_targets.NAME, which `auricle targets shards=… kmeans=… out=…` writes with the same "
            "centres"
        )
    evaluate = step("evaluate", f"checkpoint={training[-1].folder()}", f"out={root / 'evaluation'}")
    found = [preprocess, *(labelling if wants_labels else []), *training, evaluate]
    return [one for one in found if one.command in settings.steps]


def require_step_inputs(chain: list[PipelineStep]) -> None:
    """Raises ConfigError if an input of a step is missing and no earlier step writes it."""
    written: list[Path] = []
    for one in chain:
        job = one.job()
        inputs.require_inputs(job, written, f"{one.command}.")
        written += [Path(job.out)] if isinstance(job, PreprocessJob | TargetsJob) else [one.folder()]


def why_pretraining(run: PretrainJob) -> str:
    """Returns the reason why a pretraining must run (again); "" if its last checkpoint is intact and of this config.

    Raises:
        DamagedFileError: the checkpoint of the last step is damaged; training would not write it again.
    """
    from pretrain.checkpointing import resume, stored
    from pretrain.train_module import open_run_reader

    folder = metadata.folder_of(run)
    done = steps_done(folder)
    if done < run.train.steps:
        return f"is at step {done} of {run.train.steps}"
    newest = folder / "checkpoints" / f"step_{done:08d}"
    if damaged := stored.damage(newest):
        raise DamagedFileError(f"{damaged}; {remedy(newest.parent)}")
    state = stored.read_state(newest)
    resume.require_same_config(state["config"], metadata.run_config(run), newest)
    reader = open_run_reader(run)
    try:
        same = state["cursor"]["plan_hash"] == reader.plan_hash
    finally:
        reader.close()
    return "" if same else "was trained on other shards or labels"
