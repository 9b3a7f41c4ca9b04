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


MFCC_HZ = 100


WINDOW, HOP = 400, 160
"""Samples of a frame of MFCC, and from one to the next."""


def kaldi_mfcc(rate_hz: int = MFCC_HZ, silence_db: float = 0.0) -> Extractor:
    """Returns HuBERT's first features (Hsu et al. 2021, §IV-B): Kaldi's 13 MFCC, Δ and ΔΔ, (F, 39) at 100 Hz.

    Kaldi's definition (pre-emphasis, Povey window, liftering) on one utterance at a time; the one that models compute
    on their device is `pretrain.nn.spectral.TorchaudioMfcc`.

    Args:
        rate_hz: frames per second, a divisor of 100: each is the mean of 100 / rate_hz frames, the last one of as many
            as there are.
        silence_db: frames whose power is this far below that of the loudest frame are all zero, so that silence is one
            cluster and not several by chance; 0: as they are.
    """
    if rate_hz < 1 or MFCC_HZ % rate_hz:
        raise ValueError(f"rate_hz={rate_hz}: must divide {MFCC_HZ}")
    import torch
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    torch.set_num_threads(1)

    @torch.inference_mode()
    def compute(wave: Wave) -> Matrix:
        if len(wave) < WINDOW:
            return np.zeros((0, 39), np.float32)
        # Kaldi's scale: 16-bit integers
        cepstra = kaldi.mfcc(torch.from_numpy(wave)[None] * 32768.0, sample_frequency=SAMPLE_RATE, use_energy=False).T
        first = compute_deltas(cepstra)
        made: Matrix = torch.cat([cepstra, first, compute_deltas(first)]).T.contiguous().numpy()
        made = _means(made, MFCC_HZ // rate_hz)
        if silence_db:
            power = _means(np.square(np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]), MFCC_HZ // rate_hz)
            made[power.mean(1) < power.mean(1).max() * 10 ** (-silence_db / 10)] = 0.0
        return made

    return Extractor(compute, rate_hz)


def _means(features: Matrix, size: int) -> Matrix:
    """Returns means over `size` frames at a time, (ceil(F / size), D)."""
    if size == 1:
        return features
    first = np.arange(0, len(features), size)
    counts = np.minimum(size, len(features) - first)
    made: Matrix = (np.add.reduceat(features, first, axis=0) / counts[:, None]).astype(np.float32)
    return made
