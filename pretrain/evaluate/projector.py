"""Labelled frames for TensorBoard's projector, coloured by phone, speaker or language."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.evaluate import alignments, label_sets
from pretrain.evaluate.config import MEASURES, OF_HEADS, EvaluateConfig, task_names
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Interval, Utterance, grid_labels
from pretrain.evaluate.task_inputs import TaskInputs
from pretrain.evaluate.tasks import open_task

UTTERANCES, FRAMES = 24, 1_000
HEADER = ["phone", "speaker", "language", "utterance", "second"]


def labelled_frames(config: EvaluateConfig, encoder: FrozenEncoder) -> tuple[Tensor, list[list[str]]]:
    """Returns up to FRAMES frames of the last layer, (N, D), of the validation speakers, and a row of HEADER for each.

    The speech is that of the first probing task of `config`; with an alignment, frames of silence are skipped. Raises
    the same errors as the task.
    """
    names = [name for name in task_names(config) if name not in (*MEASURES, *OF_HEADS)]
    few = dataclasses.replace(config, max_utterances=UTTERANCES)
    task = TaskInputs(few, names[0] if names else config.frames, lambda line: None)
    chosen = task.parts[1]
    phones, silence = (task.phones, task.silence) if task.phones else _phones(config, task.root, chosen)
    frames, rows = [], []
    for utterance in chosen:
        wave_T = task.waves(utterance)
        x_FD = encoder.encode(wave_T)[-1].float()
        spoken = grid_labels(phones.get(utterance.name, ()), len(wave_T) / SAMPLE_RATE, encoder.rate_hz)
        spoken += [""] * (len(x_FD) - len(spoken))
        for frame in range(len(x_FD)):
            if spoken[frame] not in {*silence, ""} or utterance.name not in phones:
                frames.append(x_FD[frame])
                rows.append(_row(utterance, spoken[frame], frame, encoder))
    every = -(-len(frames) // FRAMES) or 1
    return torch.stack(frames[::every]), rows[::every]


def _phones(
    config: EvaluateConfig, root: Path, utterances: Sequence[Utterance]
) -> tuple[dict[str, list[Interval]], frozenset[str]]:
    """Returns the frame labels of the task `config.frames` and its silence; none without an alignment."""
    frames = open_task(config.frames).config
    given = alignments.choose_alignment(config.phones, frames.alignment, utterances)
    beside = given.startswith(".") or alignments.names_files(given, utterances)
    if not given or not (beside or (root / given).exists()):
        return {}, frozenset()
    symbols = label_sets.read(config.label_set or frames.label_set)
    found = alignments.read_alignment(given, root, utterances, frames.tier)
    return {name: symbols.intervals(some) for name, some in found.items()}, symbols.silence


def _row(utterance: Utterance, phone: str, frame: int, encoder: FrozenEncoder) -> list[str]:
    texts: Sequence[str] = (phone, utterance.speaker, utterance.language, utterance.name)
    return [*(text or "-" for text in texts), f"{(frame + 0.5) / encoder.rate_hz:.2f}"]
