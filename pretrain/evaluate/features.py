"""Labelled feature vectors of utterances: frames on a common 50 Hz grid, or one pooled vector each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from data_pipeline.audio.codecs import AudioError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Interval, Utterance, grid_labels, read_audio

GRID_HZ = 50.0
"""Rate at which frames are labelled and counted, so that encoders of any rate are evaluated on the same labels."""
MOST_BYTES = 4 << 30
"""Decoded audio that is kept; further recordings are decoded again."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled vectors. x_NLD: float16 features of every layer.  y_N: class.  speaker_N: index into `speakers`."""

    x_NLD: Tensor
    y_N: Tensor
    speaker_N: np.ndarray
    speakers: tuple[str, ...]

    def tally(self, hits_N: np.ndarray, counted_N: np.ndarray) -> dict[str, tuple[float, float]]:
        """Returns hits and trials by speaker.

        Args:
            hits_N: 1 for correct predictions, else 0.
            counted_N: weight of each vector, 0 or 1.
        """
        n = len(self.speakers)
        hits = np.bincount(self.speaker_N, weights=hits_N * counted_N, minlength=n)
        trials = np.bincount(self.speaker_N, weights=counted_N, minlength=n)
        return {s: (float(h), float(t)) for s, h, t in zip(self.speakers, hits, trials, strict=True)}


class Waves:
    """Cache of decoded audio, shared by all encoders and tasks."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._left = most_bytes

    def __call__(self, utterance: Utterance) -> Tensor:
        """Returns the audio of an utterance, (T,) float32 at 16 kHz. Raises AudioError if it is unusable."""
        key = utterance.path, utterance.start, utterance.stop, utterance.channel
        if key in self._kept:
            return self._kept[key]
        wave_T = torch.from_numpy(read_audio(utterance))
        if self._left >= 4 * len(wave_T):
            self._left -= 4 * len(wave_T)
            self._kept[key] = wave_T
        return wave_T

    def usable(self, utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[str], float]:
        """Decodes utterances; returns those that can be used, a line for each other one, and seconds of audio."""
        kept, problems, samples = [], [], 0
        for utterance in utterances:
            try:
                samples += len(self(utterance))
                kept.append(utterance)
            except AudioError as error:
                problems.append(f"{utterance.name}: {error.reason} ({error})")
        return kept, problems, samples / SAMPLE_RATE


def grid_frames(rate_hz: float, n_frames: int, cells: int) -> Tensor:
    """Returns the encoder frame with the nearest centre for each cell of the grid, (cells,) int64.

    Args:
        rate_hz: frame rate of the encoder.
        n_frames: number of its frames; indices are limited to them.
        cells: number of cells, at GRID_HZ.
    """
    centre_s = (torch.arange(cells) + 0.5) / GRID_HZ
    return (centre_s * rate_hz - 0.5).round().long().clamp(0, n_frames - 1)


def phone_frames(
    encoder: FrozenEncoder,
    utterances: Sequence[Utterance],
    phones: Mapping[str, Sequence[Interval]],
    classes: Mapping[str, int],
    waves: Waves,
    layers: Sequence[int] | None = None,
) -> Labelled:
    """Returns the features of every labelled cell of the grid.

    Args:
        encoder: computes the features.
        utterances: the utterances.
        phones: alignment of each utterance, by name.
        classes: index of each phone; cells with other phones are skipped.
        waves: decoded audio.
        layers: layers to keep; None: all.
    """
    xs, ys, owners = [], [], []
    speakers = tuple(sorted({u.speaker for u in utterances}))
    for utterance in utterances:
        wave_T = waves(utterance)
        labels = grid_labels(phones[utterance.name], len(wave_T) / SAMPLE_RATE, GRID_HZ)
        known = torch.tensor([i for i, phone in enumerate(labels) if phone in classes], dtype=torch.long)
        if not len(known):
            continue
        x_LFD = _chosen(encoder.encode(wave_T), layers)
        x_LCD = x_LFD[:, grid_frames(encoder.rate_hz, x_LFD.shape[1], len(labels))[known]]
        xs.append(x_LCD.transpose(0, 1).half())
        ys.append(torch.tensor([classes[labels[i]] for i in known.tolist()]))
        owners.append(np.full(len(known), speakers.index(utterance.speaker)))
    return Labelled(torch.cat(xs), torch.cat(ys), np.concatenate(owners), speakers)


def pooled(
    encoder: FrozenEncoder,
    utterances: Sequence[Utterance],
    target: Mapping[str, str],
    classes: Mapping[str, int],
    waves: Waves,
    pool: Callable[[Tensor], Tensor],
    layers: Sequence[int] | None = None,
) -> Labelled:
    """Returns one vector per utterance.

    Args:
        encoder: computes the features.
        utterances: the utterances.
        target: class of each utterance, by name.
        classes: index of each class.
        waves: decoded audio.
        pool: maps (L, F, D) features to (L, D').
        layers: layers to keep; None: all.
    """
    speakers = tuple(sorted({u.speaker for u in utterances}))
    x_NLD = torch.stack([pool(_chosen(encoder.encode(waves(u)), layers)).half() for u in utterances])
    y_N = torch.tensor([classes[target[u.name]] for u in utterances])
    return Labelled(x_NLD, y_N, np.array([speakers.index(u.speaker) for u in utterances]), speakers)


def quarters(x_LFD: Tensor) -> Tensor:
    """Concatenates the means of the four quarters of an utterance, (L, F, D) to (L, 4 · D)."""
    x_LFD = x_LFD if x_LFD.shape[1] >= 4 else x_LFD.repeat_interleave(4, dim=1)
    return torch.cat([part.mean(1) for part in x_LFD.tensor_split(4, dim=1)], dim=-1)


def mean_and_deviation(x_LFD: Tensor) -> Tensor:
    """Concatenates mean and standard deviation over time, (L, F, D) to (L, 2 · D)."""
    return torch.cat([x_LFD.mean(1), x_LFD.std(1, unbiased=False)], dim=-1)


POOLS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"quarters": quarters, "mean_and_deviation": mean_and_deviation}
"""Functions that reduce the frames of an utterance to one vector: (L, F, D) to (L, D')."""


def _chosen(x_LFD: Tensor, layers: Sequence[int] | None) -> Tensor:
    return x_LFD if not layers or len(x_LFD) == 1 else x_LFD[list(layers)]
