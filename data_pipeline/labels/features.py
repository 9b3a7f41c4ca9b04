"""Acoustic features from which frame labels are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.types import SAMPLE_RATE

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Extractor:
    """compute: (T,) waveform at 16 kHz to (F, D) features at rate_hz."""

    compute: Callable[[Wave], Matrix]
    rate_hz: int


def mfcc() -> Extractor:
    """HuBERT's first features (Hsu et al. 2021): 13 MFCC, their differences and second differences, at 100 Hz."""
    import torch
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    torch.set_num_threads(1)

    @torch.inference_mode()
    def compute(wave: Wave) -> Matrix:
        if len(wave) < 400:
            return np.zeros((0, 39), np.float32)
        found = kaldi.mfcc(torch.from_numpy(wave)[None] * 32768.0, sample_frequency=SAMPLE_RATE, use_energy=False).T
        first = compute_deltas(found)
        made: Matrix = torch.cat([found, first, compute_deltas(first)]).T.contiguous().numpy()
        return made

    return Extractor(compute, 100)
