"""Piecewise linear time warps: the same speech with segments that are played at speeds of their own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.audio.transforms import change_speed_on_device
from data_pipeline.core.types import SAMPLE_RATE

MARGIN = 320
"""Samples around a segment that are resampled with it and cut off: an FFT joins both ends."""


@dataclass(frozen=True)
class Warp:
    """The same K + 1 instants in an utterance and in its other view, in samples, (K + 1,) int64 each.

    The first is 0, the last the length; in between the map is linear.
    """

    original: np.ndarray
    view: np.ndarray

    def to_view(self, sample_N: np.ndarray) -> np.ndarray:
        """Returns the places in the other view of places in the utterance, (N,); places beyond the end are the end."""
        places_N: np.ndarray = np.interp(sample_N, self.original, self.view)
        return places_N

    def to_original(self, sample_N: np.ndarray) -> np.ndarray:
        """Returns the places in the utterance of places in the other view, (N,)."""
        places_N: np.ndarray = np.interp(sample_N, self.view, self.original)
        return places_N


def draw_warp(rng: np.random.Generator, length: int, slowest: float, fastest: float, segment_seconds: float) -> Warp:
    """Draws speeds, and where they change.

    Args:
        rng: keyed by the utterance.
        length: of the utterance, in samples.
        slowest, fastest: range of the uniform speeds.
        segment_seconds: mean length of a segment with one speed; 0: the whole utterance has one.
    """
    pieces = max(1, round(length / SAMPLE_RATE / segment_seconds)) if segment_seconds else 1
    speeds = rng.uniform(slowest, fastest, pieces)
    cuts = (np.arange(1, pieces) + rng.uniform(-0.3, 0.3, pieces - 1)) * length / pieces
    original = np.concatenate([[0], np.round(cuts), [length]]).astype(np.int64)
    lengths = np.maximum(np.diff(original) > 0, np.round(np.diff(original) / speeds)).astype(np.int64)
    return Warp(original, np.concatenate([[0], np.cumsum(lengths)]))


def warped(wave_T: Tensor, warp: Warp) -> Tensor:
    """Returns the other view of an utterance, (T',), pitch and formants moved with the speed of each segment."""
    parts = [wave_T[:0]]
    instants = list(zip(warp.original.tolist(), warp.view.tolist(), strict=True))
    for (start, begin), (end, stop) in itertools.pairwise(instants):
        if start == end:
            continue
        speed = (end - start) / (stop - begin)
        before, after = min(MARGIN, start), min(MARGIN, len(wave_T) - end)
        part_T = change_speed_on_device(wave_T[start - before : end + after], speed)
        skipped = round(before / speed)
        part_T = part_T[skipped : skipped + stop - begin]
        parts.append(F.pad(part_T, (0, stop - begin - len(part_T))))
    return torch.cat(parts)
