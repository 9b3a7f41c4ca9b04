"""Fine-tunes a checkpoint: shards of the labelled audio, a training run, error rates or accuracy on unseen speakers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_pipeline.core.atomic_files import remove
from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, base_part, load
from data_pipeline.text.artefact import TokensConfig
from launch.cli.compose import compose
from launch.cli.tables import show, table, warn
from launch.config import FinetuneJob, PretrainJob
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.runs.metadata import run_config
from launch.workflows import pretraining, tokens
from launch.workflows.submit import DRY_RUN, PREPARE
from pretrain.adaptation import finetune
from pretrain.adaptation.config import FinetuneConfig
from pretrain.adaptation.finetune import LabelledSplits
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.tuned import write_tuned
from pretrain.config import Config
from pretrain.train_module import build_model


def run(
    job: FinetuneJob,
    overrides: Sequence[str] = (),
    switches: frozenset[str] = frozenset(),
    corpus: LabelledSplits | None = None,
) -> int:
    """Runs one fine-tuning; the same call continues an interrupted one.

    Args:
        job: the fine-tuning.
        overrides: further fields of the training run.
        switches: of the command line.
        corpus: the utterances, instead of those of the manifest; nothing is measured where it has no test utterances.

    Returns:
        The exit code of the training run, see `pretraining.run`; error rates or accuracy are printed after DONE on this
        machine.

    Raises:
        ConfigError: checkpoint, manifest or an override cannot be used.
        ValueError: data or checkpoint are damaged.
    """
    settings = base_part(FinetuneConfig, job)
    if corpus is None and not settings.shards:
        corpus = finetune.find_splits(settings)
    classes = settings.classes
    if settings.task == "classify" and corpus is not None:
        classes = finetune.classes_of(settings, corpus.train)
    made = Made(settings.shards, settings.batch_seconds, classes)
    # refuses a wrong command before shards are written
    require_buildable(run_config(training_job(job, made, overrides)))
    if corpus and DRY_RUN not in switches:
        written, rejects = finetune.write_shards(corpus.train, settings, settings.folder / "data")
        made = replace(made, shards=str(written))
        if rejects:
            warn(f"{rejects} recordings cannot be used; `auricle shards stats {written}` has the reasons")
    if made.shards:
        made = replace(made, longest=finetune.longest_seconds(made.shards, settings.batch_seconds))
        if settings.task == "sequence" and DRY_RUN not in switches:
            make_symbols(settings, made.shards)
    training = training_job(job, made, overrides)
    code = pretraining.start(training, switches)
    here = isinstance(factory.for_job(training), ChildProcesses)
    if code == ExitCode.DONE and here and not switches & {DRY_RUN, PREPARE}:
        if corpus and corpus.test:
            show_results(settings, corpus)
        if settings.tune != "full":
            keep_tuned(settings)
    return code


@dataclass(frozen=True)
class Made:
    """Training data: folder of the shards ("" before they are written), longest segment in seconds, and classes."""

    shards: str
    longest: float
    classes: tuple[str, ...] = ()


def make_symbols(settings: FinetuneConfig, shards: str) -> None:
    """Makes the tokens of an attention decoder: the symbols, in FOLDER/tokens."""
    tokens.make(TokensConfig(shards=shards, out=str(settings.folder / "tokens"), symbols=settings.symbols))


def show_results(settings: FinetuneConfig, corpus: LabelledSplits) -> None:
    """Measures the finished run on the test utterances and prints a table."""
    if settings.task == "classify":
        found = finetune.measure_classes(settings, corpus)
        shown = (settings.label, f"{found.accuracy:.1%}", f"{found.chance:.1%}", found.utterances)
        show(table(("label", "accuracy", "most frequent class", "utterances"), [shown]))
        return
    rows = [(e.decoder, f"{e.wer:.1%}", f"{e.cer:.1%}", e.utterances) for e in finetune.measure(settings, corpus)]
    show(table(("decoder", "WER", "CER", "utterances"), rows))


def keep_tuned(settings: FinetuneConfig) -> None:
    """Writes the tuned weights alone, to FOLDER/tuned, where the base is a run; replaces earlier ones."""
    folder = settings.folder / "tuned"
    remove(folder)
    try:
        size = write_tuned(find_checkpoint(str(settings.folder)), folder)
    except ConfigError as error:
        warn(f"the tuned weights are not written alone: {error}")
        return
    base = find_checkpoint(settings.checkpoint)
    print(f"{folder}: the tuned weights alone, {size / 1e6:.2f} MB; their base is {base}")


def require_buildable(config: Config) -> None:
    """Raises ConfigError where the model of a run cannot be built, such as a rank that is too large."""
    try:
        with torch.device("meta"):
            build_model(config)
    except DamagedFileError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def training_job(job: FinetuneJob, made: Made, overrides: Sequence[str] = ()) -> PretrainJob:
    """Returns the training run: the recipe, the checkpoint's front end and encoder, and the user's overrides.

    Args:
        job: the fine-tuning.
        made: its data.
        overrides: further fields of the training run.

    Raises:
        ConfigError: the checkpoint or an override cannot be used.
    """
    settings = base_part(FinetuneConfig, job)
    shards = made.shards or str(settings.folder / "data" / "shards")
    values = compose("pretrain", finetune.recipe(settings, shards, made.longest, overrides))
    given_heads = values["heads"] if any(line.lstrip("+").startswith("heads") for line in overrides) else {}
    values["heads"] = finetune.heads(settings, made.classes, len(settings.symbols))
    for name, fields in given_heads.items():
        values["heads"][name] = values["heads"].get(name, {}) | fields
    if settings.task == "sequence":
        values["data"]["tokens"] = {"text": str(settings.folder / "tokens")}
    given: dict[str, dict[str, Any]] = {"frontend": {}, "encoder": {}}
    for line in overrides:
        path, equals, _ = line.lstrip("+").partition("=")
        part, _, field = path.partition(".")
        if part in given:
            if not equals or not field or "." in field:
                raise ConfigError(f"{line}: front end and encoder are those of the checkpoint; set one of their fields")
            given[part][field] = values[part][field]
    for part, architecture in finetune.checkpoint_architecture(settings.checkpoint).items():
        values[part] = architecture | given[part]
    return replace(load(PretrainJob, values), launcher=job.launcher)
