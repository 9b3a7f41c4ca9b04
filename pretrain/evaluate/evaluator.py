"""Evaluates frozen encoders, baselines and recognisers on tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import asr, joint_retrieval, separation, streaming, synthesis
from pretrain.evaluate.config import MEASURES, OF_HEADS, WITH_TEXTS, EvaluateConfig, items, layer_numbers, task_names
from pretrain.evaluate.features import Waves
from pretrain.evaluate.frozen_encoders import FrozenEncoder, open_encoder
from pretrain.evaluate.manifest import Utterance, find_manifest, read_manifest, unused_splits
from pretrain.evaluate.metrics import Interval95
from pretrain.evaluate.rows import Detail, ResultRow
from pretrain.evaluate.task_evaluation import TaskEvaluation
from pretrain.generation.voice import open_speaker
from pretrain.recognition.error_rates import require_jiwer
from pretrain.recognition.recogniser import open_recogniser
from pretrain.retrieval.embedder import open_embedder

Say = Callable[[str], None]


def evaluate(
    config: EvaluateConfig,
    say: Say = print,
    encoders: Sequence[FrozenEncoder] = (),
    details: list[Detail] | None = None,
) -> list[ResultRow]:
    """Evaluates all checkpoints on all tasks.

    Args:
        config: checkpoints, tasks, data and settings of the probes.
        say: receives progress messages, one line each.
        encoders: the checkpoints, if they are already loaded.
        details: gets accuracies of layers and confusions of each probe.

    Returns:
        One row per task, measure and encoder, including baselines.

    Raises:
        ConfigError: a task, checkpoint, corpus, column or label set is unknown, or a task has fewer than two classes.
        ValueError: a checkpoint or the data is damaged, or a speaker is in two splits.
    """
    names, _ = task_names(config), layer_numbers(config)
    if not encoders and not items(config.checkpoint):
        raise ConfigError(f"checkpoint={config.checkpoint}: names no checkpoint")
    probing = [name for name in names if name not in OF_HEADS]
    if probing and not encoders:
        encoders = [open_encoder(given, config.device) for given in items(config.checkpoint)]
    with few_threads(config.threads):
        return _evaluate(config, names, encoders, say, details)


@contextlib.contextmanager
def few_threads(most: int) -> Iterator[None]:
    """Limits the threads of torch, NumPy and scikit-learn in the block; the environment's own limit stays."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    limits: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    with contextlib.suppress(ImportError):  # comes with scikit-learn
        from threadpoolctl import threadpool_limits

        limits = threadpool_limits(min(before, most))
    try:
        with limits:
            yield
    finally:
        torch.set_num_threads(before)


def _evaluate(
    config: EvaluateConfig,
    names: Sequence[str],
    encoders: Sequence[FrozenEncoder],
    say: Say,
    details: list[Detail] | None,
) -> list[ResultRow]:
    if set(names) & set(WITH_TEXTS):
        require_jiwer()
    waves, rows = Waves(), list[ResultRow]()
    probing = [name for name in names if name not in OF_HEADS]
    tasks = {name: TaskEvaluation(config, name, say, waves) for name in probing}  # every task is read before one starts
    for name in names:
        if name in OF_HEADS:
            rows += _of_heads(config, name, read_manifest(find_manifest(config.manifest)), waves, say)
        else:
            rows += tasks[name].measures(encoders) if name in MEASURES else tasks[name].rows(encoders)
            if details is not None:
                details += tasks[name].details
    return rows


def _of_heads(
    config: EvaluateConfig, task: str, utterances: Sequence[Utterance], waves: Waves, say: Say
) -> list[ResultRow]:
    """Measures what a head of the checkpoints does: it recognises (also in streams), separates, speaks or embeds."""
    rows, corpora = [], items(config.corpora)
    if note := unused_splits([u for u in utterances if not u.part and (not corpora or u.corpus in corpora)]):
        say(f"{task}: {note}")
    for given in items(config.checkpoint):
        who, measured = _of_head(config, task, given, utterances, waves, say)
        rows += [
            ResultRow(task, measure, who, value=found.value, low=found.low, high=found.high)
            for measure, found in measured
        ]
    return rows


def _of_head(
    config: EvaluateConfig, task: str, given: str, utterances: Sequence[Utterance], waves: Waves, say: Say
) -> tuple[str, Iterable[tuple[str, Interval95]]]:
    """Returns the name of a checkpoint, and its measures with their intervals."""
    if task == "separation":
        separator = separation.open_separator(given, config.separation.head, config.device)
        who = f"{separator.name} (step {separator.step})"
        return who, separation.report(config, separator, utterances, waves, say)
    if task == "synthesis":
        voice = open_speaker(given, config.synthesis.head, config.device)
        return voice.name, synthesis.figures(config, voice, utterances, waves, say)
    if task == "retrieval":
        embedder = open_embedder(given, config.retrieval.head, config.device)
        return embedder.title, joint_retrieval.report(config, embedder, utterances, waves, say)
    recogniser = open_recogniser(given, config.asr.head, config.device)
    who = f"{recogniser.name} (step {recogniser.step})"
    if task == "streaming":
        return who, streaming.report(config, recogniser, utterances, waves, say)
    rates = asr.error_rates(config, recogniser, utterances, waves, say)
    return who, ((f"{measure}, {decoder}", rate) for measure, decoder, rate in rates)
