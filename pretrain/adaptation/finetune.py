"""Fine-tuning of a checkpoint to a speech recogniser: the config of its run, its data, and its error rates.

The run itself is one of `pretrain.train`: objective `none` and a CTC head, from the weights of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from pretrain.checkpointing.checkpoint import read_state
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.evaluate.manifest import (
    Utterance,
    find_manifest,
    labelled_parts,
    read_audio,
    read_manifest,
    span_columns,
    thinned,
)
from pretrain.interop import hf_folder
from pretrain.interop.init_weights import hugging_face_architecture
from pretrain.recognition.error_rates import Decoders, Errors, errors, fit_ngram, recognise, written
from pretrain.recognition.recogniser import RESULTS, open_recogniser

LONGEST_SECONDS = 600.0
"""Recordings are not cut: the text of a part is not known."""


@dataclass(frozen=True)
class Corpus:
    """Utterances with text; no speaker is in both parts."""

    train: Sequence[Utterance]
    test: Sequence[Utterance]


def find_corpus(settings: FinetuneConfig) -> Corpus:
    """Returns the manifest's splits train and test, as far as they have text in the recogniser's symbols.

    Raises:
        ConfigError: there is no manifest, or a split has no text.
        ValueError: a speaker is in both splits.
    """
    corpora = [c.strip() for c in settings.corpora.split(",") if c.strip()]
    listed = read_manifest(find_manifest(settings.manifest))
    train, test = labelled_parts(listed, corpora, "test", lambda u: bool(written(u.text, settings.symbols)))
    if not train or not test:
        named = f"corpora={settings.corpora}" if corpora else "any corpus"
        raise ConfigError(f"manifest={settings.manifest}: no text in the splits train and test of {named}")
    return Corpus(thinned(train, settings.max_utterances), thinned(test, settings.max_utterances))


def write_shards(utterances: Sequence[Utterance], symbols: str, folder: Path) -> tuple[Path, int]:
    """Writes utterances with their texts to FOLDER/shards, one segment each; existing shards stay.

    Returns:
        The folder of the shards, and the number of recordings that cannot be used; they are listed there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest, out = folder / "train.jsonl", folder / "shards"
    rows = [
        {"path": u.path, "speaker": u.speaker, "text": written(u.text, symbols), "corpus": u.corpus} | span_columns(u)
        for u in utterances
    ]
    write_atomically(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    job = PreprocessConfig(
        out=str(out),
        corpus=ManifestCorpus(path=str(manifest), allow_outside=True),
        cut=CutConfig(max_seconds=LONGEST_SECONDS, min_seconds=0.0),
    )
    found = discover(job.corpus)
    plan = freeze_plan(FileStore(job.out), found.files, job)
    rejects = len(found.rejects)
    for unit in track(plan.units, "writing shards", transient=True):
        rejects += sum(process_unit(unit, job).record.rejects.values())
    return out, rejects


def longest_seconds(shards: str, most: float) -> float:
    """Returns the length of the longest segment of shards, rounded up to a hundredth, at most `most` seconds."""
    indexes = [read_index(shards, record) for record in done_records(shards)]
    samples = max(max(index["n_samples"].to_pylist(), default=0) for index in indexes)
    return min(most, math.ceil(100 * samples / SAMPLE_RATE) / 100)


def architecture(checkpoint: str) -> dict[str, dict[str, Any]]:
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
        f"objective.frozen_steps={0 if settings.random_weights else settings.frozen_steps}",
        f"objective.mask_time={settings.mask_time}",
        f"optimizer.lr={settings.lr}",
        f"schedule.warmup_steps={settings.steps // 10}",
        f"train.steps={settings.steps}",
        *overrides,
    ]


def measure(settings: FinetuneConfig, corpus: Corpus) -> list[Errors]:
    """Decodes the test utterances with the finished run, and writes results.json into its folder.

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
