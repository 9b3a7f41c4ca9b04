"""Labelled frames for TensorBoard's projector, coloured by phone, speaker or language."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.audio.codecs import read_mono
from pretrain.evaluate.config import EvaluateConfig, items, task_names
from pretrain.evaluate.features import SILENCE
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Utterance, find_manifest, grid_labels, read_manifest, read_phones
from pretrain.evaluate.tasks import PROBES, splits

UTTERANCES, FRAMES = 24, 1_000
HEADER = ["phone", "speaker", "language", "utterance", "second"]


def labelled_frames(config: EvaluateConfig, encoder: FrozenEncoder) -> tuple[Tensor, list[list[str]]]:
    """Returns up to FRAMES frames of the last layer, (N, D), of the validation speakers, and a row of HEADER for each.

    The speech is that of the first probing task of `config`; with an alignment, frames of silence are skipped. Raises
    the same errors as the task.
    """
    tasks = [PROBES[name] for name in task_names(config) if name in PROBES]
    manifest = find_manifest(config.manifest)
    alignment = manifest.parent / config.phones
    phones = read_phones(alignment) if alignment.is_file() else {}
    utterances = read_manifest(manifest)
    if not tasks or tasks[0].target is None:
        utterances = [u for u in utterances if u.name in phones]
    corpora = items(config.corpora)
    chosen = splits(tasks[0] if tasks else PROBES["phones"], utterances, corpora, UTTERANCES)[1]
    frames, rows = [], []
    for utterance in chosen:
        wave_T = torch.from_numpy(read_mono(str(utterance.path)))
        x_FD = encoder.encode(wave_T)[-1].float()
        spoken = grid_labels(phones.get(utterance.name, ()), len(wave_T) / 16_000, encoder.rate_hz)
        spoken += [""] * (len(x_FD) - len(spoken))
        for frame in range(len(x_FD)):
            if spoken[frame] not in SILENCE or utterance.name not in phones:
                frames.append(x_FD[frame])
                rows.append(_row(utterance, spoken[frame], frame, encoder))
    every = -(-len(frames) // FRAMES) or 1
    return torch.stack(frames[::every]), rows[::every]


def _row(utterance: Utterance, phone: str, frame: int, encoder: FrozenEncoder) -> list[str]:
    texts: Sequence[str] = (phone, utterance.speaker, utterance.language, utterance.name)
    return [*(text or "-" for text in texts), f"{(frame + 0.5) / encoder.rate_hz:.2f}"]
