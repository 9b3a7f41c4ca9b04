"""Fine-tuning of a checkpoint to recognition or classes: the config of its run, its data, and what is measured.

The run itself is one of `pretrain.train`: objective `none` and heads, from the weights of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from data_pipeline.core.atomic_files import write_atomically, write_json
from data_pipeline.core.schema import ConfigError, dump
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.preprocess.config import CutConfig, PreprocessConfig
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.preprocess.work_plan import freeze_plan
from data_pipeline.shards.records import done_records, read_index
from pretrain.adaptation.config import FinetuneConfig
from pretrain.adaptation.tasks import open_tasks
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.evaluate.manifest import (
    Utterance,
    corpora_in_words,
    find_manifest,
    labelled_parts,
    read_audio,
    read_manifest,
    span_columns,
    thinned,
)
from pretrain.interop import hf_folder
from pretrain.interop.init_weights import hugging_face_architecture
from pretrain.recognition.error_rates import Decoders, Errors, errors, fit_ngram, recognise, require_jiwer, written
from pretrain.recognition.recogniser import RESULTS, open_recogniser

LONGEST_SECONDS = 600.0
"""Recordings are not cut: the text of a part is not known."""
CLASSES = "classes"
"""Name of the head of task=classify."""
CTC_WEIGHT = 0.3
"""Of CTC beside an attention decoder, as in ESPnet's recipes."""


@dataclass(frozen=True)
class LabelledSplits:
    """Utterances with text; no speaker is in both parts."""

    train: Sequence[Utterance]
    test: Sequence[Utterance]


def find_splits(settings: FinetuneConfig) -> LabelledSplits:
    """Returns the manifest's splits train and test, as far as they have text in the recogniser's symbols, or a class.

    Raises:
        ConfigError: there is no manifest, a split has no text or class, or jiwer is not installed.
        ValueError: a speaker is in both splits.
    """
    if settings.task != "classify":
        require_jiwer()  # which measures the finished run
    listed = read_manifest(find_manifest(settings.manifest))
    train, test = labelled_parts(listed, settings.chosen_corpora, "test", lambda u: bool(_label(u, settings)))
    if not train or not test:
        what = f"value in the column {settings.label!r}" if settings.task == "classify" else "text"
        raise ConfigError(
            f"manifest={settings.manifest}: no {what} in the splits train and test of "
            f"{corpora_in_words(settings.chosen_corpora, listed)}"
        )
    return LabelledSplits(thinned(train, settings.max_utterances), thinned(test, settings.max_utterances))


def _label(utterance: Utterance, settings: FinetuneConfig) -> str:
    if settings.task == "classify":
        value = utterance.value(settings.label)
        return value if not settings.classes or value in settings.classes else ""
    return written(utterance.text, settings.symbols)


def classes_of(settings: FinetuneConfig, train: Sequence[Utterance]) -> tuple[str, ...]:
    """Returns the classes: those given, or the values in the training data.

    Args:
        settings: with the classes, if they are given, and the column of the labels.
        train: utterances to learn from.

    Returns:
        Labels, sorted unless they are given.

    Raises:
        ConfigError: there are fewer than two.
    """
    found = settings.classes or tuple(sorted({_label(u, settings) for u in train}))
    if len(found) < 2:
        raise ConfigError(f"label={settings.label}: classes {list(found)} in the training data; two or more are needed")
    return found


def write_shards(utterances: Sequence[Utterance], settings: FinetuneConfig, folder: Path) -> tuple[Path, int]:
    """Writes utterances with their texts or classes to FOLDER/shards, one segment each; existing shards stay.

    Args:
        utterances: recordings, or spans of them.
        settings: the task, and the column of the labels.
        folder: a manifest and the shards are written into it.

    Returns:
        The folder of the shards, and the number of recordings that cannot be used; they are listed there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest, out = folder / "train.jsonl", folder / "shards"
    column = settings.label if settings.task == "classify" else "text"
    rows = [
        {"path": u.path, "speaker": u.speaker, "corpus": u.corpus} | {column: _label(u, settings)} | span_columns(u)
        for u in utterances
    ]
    write_atomically(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    job = PreprocessConfig(
        out=str(out),
        corpus=ManifestCorpus(path=str(manifest), allow_outside=True),
        cut=CutConfig(max_seconds=LONGEST_SECONDS, min_seconds=0.0),
    )
    found = discover(job.corpus)
    plan = freeze_plan(FileStore(job.out), found.recordings, job)
    rejects = len(found.rejects)
    for unit in track(plan.work_units(), "writing shards", total=len(plan.units), transient=True):
        rejects += sum(process_unit(unit, job).record.rejects.values())
    return out, rejects


def longest_seconds(shards: str, most: float) -> float:
    """Returns the length of the longest segment of shards, rounded up to a hundredth, at most `most` seconds."""
    indexes = [read_index(shards, record) for record in done_records(shards)]
    samples = max(max(index["n_samples"].to_pylist(), default=0) for index in indexes)
    return min(most, math.ceil(100 * samples / SAMPLE_RATE) / 100)


def checkpoint_architecture(checkpoint: str) -> dict[str, dict[str, Any]]:
    """Returns the config of front end and encoder of a checkpoint, as plain values.

    Raises:
        ConfigError: there is no checkpoint, or a Hugging Face model that has no counterpart here.
    """
    folder = find_checkpoint(checkpoint)
    if (folder / "state.json").is_file():
        values = read_state(folder)["config"]
        return {part: values[part] for part in ("frontend", "encoder")}
    fields = hugging_face_architecture(hf_folder.read_config(folder), hf_folder.read_processor(folder), checkpoint)
    found: dict[str, dict[str, Any]] = {"frontend": {}, "encoder": {}}
    for name, value in fields.items():
        part, _, field = name.partition(".")
        found[part][field] = value
    return found


def recipe(settings: FinetuneConfig, shards: str, longest: float, overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of the training run, front end and encoder excepted.

    Args:
        settings: of the fine-tuning.
        shards: folder of the training data.
        longest: seconds of its longest segment.
        overrides: the user's, which come last.
    """
    folder = settings.folder
    frozen_steps = settings.frozen_steps if settings.tune == "full" and not settings.random_weights else 0
    return [
        "experiment=finetune_ctc",
        f"runs={folder.parent}",
        f"name={folder.name}",
        f"seed={settings.seed}",
        f"device={settings.device}",
        f"init={'' if settings.random_weights else find_checkpoint(settings.checkpoint)}",
        f"data.shards={shards}",
        f"data.batch_seconds={settings.batch_seconds}",
        f"data.max_seconds={longest}",
        f"objective.frozen_steps={frozen_steps}",
        f"objective.mask_time={settings.mask_time}",
        f"optimizer.lr={settings.peak_lr}",
        f"tune.name={settings.tune}",
        f"data.labels=[{','.join(map(json.dumps, settings.labels))}]",
        f"schedule.warmup_steps={settings.steps // 10}",
        f"train.steps={settings.steps}",
        *overrides,
    ]


def heads(settings: FinetuneConfig, classes: Sequence[str], tokens: int) -> dict[str, dict[str, Any]]:
    """Returns the configs of the new heads, as plain values.

    Args:
        settings: of the fine-tuning.
        classes: of task=classify.
        tokens: number of tokens of the text, of task=sequence.
    """
    if settings.task == "ctc":
        return {"text": {"name": "ctc", "symbols": settings.symbols}}
    if settings.task == "classify":
        return {CLASSES: {"name": "classifier", "label": settings.label, "classes": list(classes), "loss": "softmax"}}
    decoder = {"layers": 2, "heads": 4, "ffn_dim": 1024}
    return {
        "ctc": {"name": "ctc", "tokens": "text", "vocabulary": tokens, "weight": CTC_WEIGHT},
        "text": {
            "name": "sequence", "tokens": "text", "vocabulary": tokens, "weight": 1 - CTC_WEIGHT, "decoder": decoder,
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """Share of the test utterances whose class is found, and that of the most frequent class."""

    accuracy: float
    chance: float
    utterances: int


def measure_classes(settings: FinetuneConfig, corpus: LabelledSplits) -> Accuracy:
    """Finds the classes of the test utterances with the finished run, and writes results.json into its folder."""
    model = open_tasks({settings.label: str(settings.folder)}, settings.device)
    truth = [_label(u, settings) for u in corpus.test]
    found = [model.classify([read_audio(u)], [settings.label])[0] for u in track(corpus.test, "test", transient=True)]
    hits = sum(one == other.label for one, other in zip(truth, found, strict=True))
    most = Counter(truth).most_common(1)[0][1]
    result = Accuracy(hits / len(truth), most / len(truth), len(truth))
    write_json(settings.folder / RESULTS, {"classes": dataclasses.asdict(result), "finetune": dump(settings)})
    return result


def measure(settings: FinetuneConfig, corpus: LabelledSplits) -> list[Errors]:
    """Decodes the test utterances with the finished run, and writes results.json into its folder.

    Args:
        settings: of the run, with its folder and the decoders.
        corpus: texts to learn the n-gram from, and test utterances.

    Returns:
        Error rates of each decoder.
    """
    recogniser = open_recogniser(str(settings.folder), device=settings.device)
    symbols = recogniser.head.symbols

    def waves() -> Iterator[np.ndarray]:
        for utterance in track(corpus.test, "recognising", transient=True):
            yield read_audio(utterance)

    ngram = fit_ngram((u.text for u in corpus.train), settings.ngram, symbols)
    decoded = recognise(recogniser, waves(), Decoders(settings.beam, ngram, settings.ngram_weight))
    references = [written(u.text, symbols) for u in corpus.test]
    found = [errors(decoder, references, texts) for decoder, texts in decoded]
    rows = [dataclasses.asdict(row) for row in found]
    write_json(settings.folder / RESULTS, {"errors": rows, "finetune": dump(settings)})
    return found
