"""Transforms of waveforms that the data loader and the objectives share: speed, reverberation, mixing, noise.

Arrays on the CPU serve the loader's worker processes, tensors on the model's device serve the objectives. Random
numbers come from the caller, so each function depends on its arguments alone.

torchaudio adds noise. Implemented here, with the cost of the alternative (benchmarks/features.py measures it):
resampling by soxr, since torchaudio's default filter differs from it by 2e-3 to 4e-2 and its longer one takes 1.5
(9:10) to 12 (441:160) times as long; convolution by an FFT whose size is a power of two, since torchaudio's has the
length of the result and takes 5.4 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_pipeline.core.types import SAMPLE_RATE

if TYPE_CHECKING:  # the command line composes configs without torch; training benchmarks run without codecs
    from torch import Tensor

    from data_pipeline.audio.codecs import Wave

SILENCE_POWER = 1e-12
"""Mean square below which a signal counts as silent."""


@dataclass(frozen=True)
class Stretch:
    """`length` samples from `begin` of one signal, placed at `at` of another."""

    length: int
    begin: int
    at: int


def change_speed(wave: Wave, factor: float, length: int) -> Wave:
    """Returns `wave` played `factor` times as fast, pitch included.

    Args:
        wave: (T,) samples.
        factor: 2 halves the duration.
        length: exact number of samples to return; the result is padded with zeros or cut by a few samples.
    """
    import soxr

    changed = soxr.resample(wave, factor * SAMPLE_RATE, SAMPLE_RATE).astype(np.float32)
    out = np.zeros(length, np.float32)
    out[: min(length, len(changed))] = changed[:length]
    return out


def change_speed_on_device(wave_T: Tensor, factor: float) -> Tensor:
    """Returns `wave_T` played `factor` times as fast, pitch included, by an inverse FFT of another length.

    For speeds drawn from a continuous range and tensors on any device. A polyphase resampler, which `change_speed`
    uses, needs a ratio of small integers: torchaudio's kernel for a ratio such as 1.1037 has 16,000 phases.
    """
    import torch

    if not len(wave_T):
        return wave_T
    length = max(1, round(len(wave_T) / factor))
    changed: Tensor = torch.fft.irfft(torch.fft.rfft(wave_T), n=length)
    return changed * (length / len(wave_T))


def reverberate(wave: Wave, response: Wave) -> Wave:
    """Returns `wave` convolved with a room impulse response, its strongest tap at delay 0, at the power of `wave`."""
    response = response[int(np.abs(response).argmax()) :]
    size = 1 << (len(wave) + len(response) - 2).bit_length()
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    level = np.sqrt(power(wave) / max(power(wet), 1e-20))
    scaled: Wave = (wet * level).astype(np.float32)
    return scaled


def draw_stretch(
    rng: np.random.Generator, wave_length: int, other_length: int, longest: int, shortest: int = 0
) -> Stretch:
    """Draws which part of another utterance is mixed in, and where (WavLM, arXiv 2110.13900, algorithm 1).

    Its length is uniform on `shortest` … `longest` and at most `other_length`; both positions are uniform.

    Args:
        rng: generator of the draws.
        wave_length: samples of the utterance that is mixed into.
        other_length: samples of the other one.
        longest, shortest: limits of the stretch, in samples.
    """
    length = min(int(rng.integers(shortest, longest + 1)), other_length)
    begin = int(rng.integers(other_length - length + 1))
    return Stretch(length, begin, int(rng.integers(wave_length - length + 1)))


def mix_in(wave_T: Tensor, other_T: Tensor, stretch: Stretch, snr_db: float) -> None:
    """Adds a stretch of `other_T` to `wave_T` in place; adds nothing where `other_T` is silent."""
    wave_T[stretch.at : stretch.at + stretch.length] += scaled_stretch(wave_T, other_T, stretch, snr_db)


def scaled_stretch(wave_T: Tensor, other_T: Tensor, stretch: Stretch, snr_db: float) -> Tensor:
    """Returns a stretch of `other_T` at the level at which it is mixed into `wave_T`; zeros where `other_T` is silent.

    As the released `mixing_collated_audios` of WavLM: `snr_db` is the ratio of the powers of the whole signals, not of
    the stretch.

    Args:
        wave_T: the utterance that is mixed into, (T,).
        other_T: the other one.
        stretch: which part of it, and where in `wave_T`.
        snr_db: ratio of the powers of both, in dB.
    """
    import torch

    other_power = other_T.square().mean()
    gain = (wave_T.square().mean() / (10 ** (snr_db / 10) * other_power)).sqrt()
    # torch.where instead of a branch: no wait for the device
    return torch.where(other_power > 0, gain, 0.0) * other_T[stretch.begin : stretch.begin + stretch.length]


def add_noise(wave: Wave, noise: Wave, snr_db: float) -> Wave:
    """Returns the sum of two equally long signals at a signal-to-noise ratio; `wave` itself where `noise` is silent."""
    if np.dot(noise, noise) <= SILENCE_POWER * len(noise):
        return wave
    import torch
    from torchaudio.functional import add_noise as mixed

    sum_1T: Tensor = mixed(torch.from_numpy(wave)[None], torch.from_numpy(noise)[None], torch.tensor([snr_db]))
    return sum_1T[0].numpy()


def repeat_to_length(noise: Wave, length: int, rng: np.random.Generator) -> Wave:
    """Returns `length` samples of a recording from a random position on, continued from its start at its end."""
    start = int(rng.integers(len(noise)))
    return np.take(noise, np.arange(start, start + length), mode="wrap")


def power(wave: npt.NDArray[np.floating]) -> float:
    """Returns the mean square; 0 for an empty signal."""
    return float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0
