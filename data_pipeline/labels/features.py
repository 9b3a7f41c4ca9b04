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
    """A feature extractor. `compute` turns (T,) samples at 16 kHz into (F, D) features at `rate_hz` frames a second."""

    compute: Callable[[Wave], Matrix]
    rate_hz: int


def kaldi_mfcc() -> Extractor:
    """Returns HuBERT's first features (Hsu et al. 2021, §IV-B): Kaldi's 13 MFCC, Δ and ΔΔ, (F, 39) at 100 Hz.

    Kaldi's definition (pre-emphasis, Povey window, liftering) on one utterance at a time; the one that models compute
    on their device is `pretrain.nn.spectral.TorchaudioMfcc`.
    """
    import torch
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    torch.set_num_threads(1)

    @torch.inference_mode()
    def compute(wave: Wave) -> Matrix:
        if len(wave) < 400:
            return np.zeros((0, 39), np.float32)
        # Kaldi's scale: 16-bit integers
        cepstra = kaldi.mfcc(torch.from_numpy(wave)[None] * 32768.0, sample_frequency=SAMPLE_RATE, use_energy=False).T
        first = compute_deltas(cepstra)
        made: Matrix = torch.cat([cepstra, first, compute_deltas(first)]).T.contiguous().numpy()
        return made

    return Extractor(compute, 100)
