"""Adapts a checkpoint to a few labelled clips: a fine-tuning of seconds, and the classes of further recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.audio.codecs import AudioError, read_mono
from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.discovery import discover
from launch.cli.tables import warn
from launch.config import FinetuneJob
from launch.workflows import finetuning
from pretrain.adaptation.config import Tune
from pretrain.adaptation.finetune import LabelledSplits
from pretrain.adaptation.tasks import Class, open_tasks
from pretrain.evaluate.manifest import Utterance, read_audio, utterances_of

LABEL = "class"
RATES = {"full": 3e-3, "adapter": 3e-3}
"""Peak learning rates of tens of updates, the best ones of benchmarks/prove/prompts.py --pilot; of other ways 1e-2."""
MOST_SECONDS = 40.0
"""Audio per update, at most; fewer clips are all in each update."""


def read_clips(folder: Path) -> tuple[list[Utterance], float]:
    """Returns the usable clips of FOLDER/CLASS/CLIP, and their audio in seconds; others are listed as warnings.

    Raises:
        ConfigError: there is no such folder, or fewer than two classes have a usable clip.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; it holds a subfolder of clips for each class")
    # absolute, since the clips are listed in a file of the run folder
    found = discover(PathCorpus(path=str(folder.absolute()), pattern=rf"^(?P<{LABEL}>[^/]+)/"))
    unusable = [f"{reject.file_id} ({reject.reason})" for reject in found.rejects]
    clips, samples = [], 0
    for utterance in utterances_of(found.files):
        if not utterance.value(LABEL):
            unusable.append(f"{utterance.name} (in no subfolder)")
            continue
        try:
            samples += len(read_audio(utterance))
        except AudioError as error:
            unusable.append(f"{utterance.name} ({error})")
            continue
        clips.append(utterance)
    if unusable:
        warn(f"{len(unusable)} clips cannot be used: {', '.join(unusable[:5])}{' …' if len(unusable) > 5 else ''}")
    classes = Counter(utterance.value(LABEL) for utterance in clips)
    if len(classes) < 2:
        there = ", ".join(f"{name} ({count} clips)" for name, count in sorted(classes.items())) or "none"
        raise ConfigError(f"{folder}: needs a subfolder with usable clips for each of two classes or more; has {there}")
    return clips, samples / SAMPLE_RATE


def adapt(folder: Path, checkpoint: str, out: Path, tune: Tune, steps: int, seed: int = 0) -> int:
    """Fine-tunes a checkpoint to the classes of a few clips; the same call continues an interrupted run.

    Args:
        folder: a subfolder with clips for each class.
        checkpoint: run, checkpoint or Hugging Face folder to start from.
        out: run folder.
        tune: what learns.
        steps: updates.
        seed: keys every random draw.

    Returns:
        The exit code of the training run.

    Raises:
        ConfigError: folder, checkpoint or a value cannot be used.
    """
    clips, seconds = read_clips(folder)
    values = {
        "checkpoint": checkpoint, "task": "classify", "tune": tune, "label": LABEL, "steps": steps, "frozen_steps": 0,
        "batch_seconds": min(MOST_SECONDS, seconds), "seed": seed, "out": str(out), "launcher": {"name": "local"},
        "lr": RATES.get(tune, 1e-2),
    }  # fmt: skip
    overrides = ["data.workers=0", "data.bucket_ratio=4", f"train.checkpoint_every={steps}"]
    return finetuning.run(load(FinetuneJob, values), overrides, corpus=LabelledSplits(clips, ()))


def classify(run: Path, files: Sequence[str]) -> Iterator[tuple[str, Class]]:
    """Yields the class of each recording by an adapted run; those that cannot be read are named as warnings."""
    if not files:
        return
    tasks = open_tasks({LABEL: str(run)})
    for file in files:
        try:
            wave_T = read_mono(file)
        except AudioError as error:
            warn(f"{file}: cannot be used ({error})")
            continue
        yield file, tasks.classify([wave_T], [LABEL])[0]
