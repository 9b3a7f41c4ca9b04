"""Fine-tunes a checkpoint: shards of the labelled audio, a training run, error rates on unseen speakers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.core.schema import ConfigError, base_part, load
from launch.cli.compose import compose
from launch.cli.tables import show, table, warn
from launch.config import FinetuneJob, PretrainJob
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.workflows import pretraining
from launch.workflows.submit import DRY_RUN, PREPARE
from pretrain.adaptation import finetune
from pretrain.adaptation.config import FinetuneConfig


def run(job: FinetuneJob, overrides: Sequence[str] = (), switches: frozenset[str] = frozenset()) -> int:
    """Runs one fine-tuning; the same call continues an interrupted one.

    Args:
        job: the fine-tuning.
        overrides: further fields of the training run.
        switches: of the command line.

    Returns:
        The exit code of the training run, see `pretraining.run`; error rates are printed after DONE on this machine.

    Raises:
        ConfigError: checkpoint, manifest or an override cannot be used.
        ValueError: data or checkpoint are damaged.
    """
    settings = base_part(FinetuneConfig, job)
    corpus = None if settings.shards else finetune.find_corpus(settings)
    training_job(job, settings.batch_seconds, overrides)  # refuses a wrong command before shards are written
    shards, longest = settings.shards, settings.batch_seconds
    if corpus and DRY_RUN not in switches:
        written, rejects = finetune.write_shards(corpus.train, settings.symbols, settings.folder / "data")
        shards = str(written)
        if rejects:
            warn(f"{rejects} recordings cannot be used; `auricle shards stats {shards}` has the reasons")
    if shards:
        longest = finetune.longest_seconds(shards, settings.batch_seconds)
    training = training_job(job, longest, overrides)
    code = pretraining.start(training, switches)
    here = isinstance(factory.for_job(training), ChildProcesses)
    if code == ExitCode.DONE and here and corpus and not switches & {DRY_RUN, PREPARE}:
        rows = [(e.decoder, f"{e.wer:.1%}", f"{e.cer:.1%}", e.utterances) for e in finetune.measure(settings, corpus)]
        show(table(("decoder", "WER", "CER", "utterances"), rows))
    return code


def training_job(job: FinetuneJob, longest: float, overrides: Sequence[str] = ()) -> PretrainJob:
    """Returns the training run: the recipe, the checkpoint's front end and encoder, and the user's overrides.

    Args:
        job: the fine-tuning.
        longest: seconds of the longest segment.
        overrides: further fields of the training run.

    Raises:
        ConfigError: the checkpoint or an override cannot be used.
    """
    settings = base_part(FinetuneConfig, job)
    shards = settings.shards or str(settings.folder / "data" / "shards")
    values = compose("pretrain", finetune.recipe(settings, shards, longest, overrides))
    values["heads"]["text"]["symbols"] = settings.symbols
    given: dict[str, dict[str, Any]] = {"frontend": {}, "encoder": {}}
    for line in overrides:
        path, equals, _ = line.lstrip("+").partition("=")
        part, _, field = path.partition(".")
        if part in given:
            if not equals or not field or "." in field:
                raise ConfigError(f"{line}: front end and encoder are those of the checkpoint; set one of their fields")
            given[part][field] = values[part][field]
    for part, architecture in finetune.architecture(settings.checkpoint).items():
        values[part] = architecture | given[part]
    return replace(load(PretrainJob, values), launcher=job.launcher)
