"""Changes to the audio as it is read: arrays in, arrays out; every draw comes from a generator keyed by the segment.

Order: speed (while decoding), room, another utterance, noise, gain. Lengths never change, so the plan's shapes hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from data_pipeline.core.schema import ConfigError, about, config
from data_pipeline.core.types import SAMPLE_RATE

Wave = npt.NDArray[np.float32]
KEPT = 256
"""Noises and responses kept in memory by each process."""
AUDIO = (".flac", ".wav", ".ogg", ".opus", ".mp3")


@config
class AugmentConfig:
    """Changes to the audio as it is read, drawn by (seed, epoch, key); see augment.py. All are off by default."""

    speeds: Annotated[
        tuple[float, ...], about("speed factors, one of which is drawn for each segment, such as [0.9, 1.0, 1.1]")
    ] = ()
    rir: Annotated[str, about("folder of room impulse responses")] = ""
    rir_prob: Annotated[float, about("probability of a room impulse response", ge=0, le=1)] = 0.0
    mix_prob: Annotated[float, about("probability that part of another utterance is mixed in", ge=0, le=1)] = 0.0
    mix_snr_db: Annotated[tuple[float, float], about("level of the utterance over the one mixed in, from and to")] = (
        -5.0,
        5.0,
    )
    mix_share: Annotated[float, about("longest mixed part as a share of the utterance", gt=0, le=1)] = 0.5
    noise: Annotated[str, about("folder of noise recordings")] = ""
    noise_prob: Annotated[float, about("probability of noise", ge=0, le=1)] = 0.0
    noise_snr_db: Annotated[tuple[float, float], about("level of the utterance over the noise, from and to")] = (
        -5.0,
        20.0,
    )
    gain_db: Annotated[tuple[float, float], about("gain, from and to")] = (0.0, 0.0)


class Augmenter:
    """Applies an AugmentConfig. Raises ConfigError for a folder that is needed and missing or empty."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.noises = _listed("noise", config.noise, config.noise_prob)
        self.rooms = _listed("rir", config.rir, config.rir_prob)
        if any(speed < 0.5 or speed > 2 for speed in config.speeds):
            raise ConfigError(f"data.augment.speeds={list(config.speeds)}: each must be between 0.5 and 2")
        for name in ("mix_snr_db", "noise_snr_db", "gain_db"):
            low, high = getattr(config, name)
            if low > high:
                raise ConfigError(f"data.augment.{name}=[{low:g}, {high:g}]: the first must not be the larger one")

    @property
    def changes_waves(self) -> bool:
        """Whether `apply` can do anything."""
        c = self.config
        return bool(c.rir_prob or c.mix_prob or c.noise_prob or c.gain_db != (0.0, 0.0))

    def speed(self, rng: np.random.Generator) -> float:
        """The factor for a segment; 1 if there are none."""
        return float(rng.choice(self.config.speeds)) if self.config.speeds else 1.0

    def apply(self, wave: Wave, others: Sequence[Wave], rng: np.random.Generator) -> Wave:
        """A changed copy of `wave`. others: the clean utterances of its micro-batch, itself among them.

        Every draw is made whether or not it is used, so that one setting does not shift the draws of the next.
        """
        c, out = self.config, wave
        dice = rng.random(3)
        seeds = rng.integers(0, 2**63, 4)
        if dice[0] < c.rir_prob:
            out = reverberate(out, _load(_pick(self.rooms, seeds[0])))
        if dice[1] < c.mix_prob and others:
            draw = np.random.default_rng(seeds[1])
            other = others[int(draw.integers(len(others)))]
            out = mix(out, other, draw.uniform(*c.mix_snr_db), c.mix_share, draw)
        if dice[2] < c.noise_prob:
            draw = np.random.default_rng(seeds[2])
            noise = tiled(_load(_pick(self.noises, seeds[2])), len(out), draw)
            out = add_at_snr(out, noise, draw.uniform(*c.noise_snr_db))
        if c.gain_db != (0.0, 0.0):
            gain = np.random.default_rng(seeds[3]).uniform(*c.gain_db)
            out = out * np.float32(10 ** (gain / 20))
        return np.clip(out, -1, 1).astype(np.float32)


def change_speed(wave: Wave, factor: float, length: int) -> Wave:
    """`wave` played `factor` times as fast, pitch and all; exactly `length` samples, zero-padded or cut by a few."""
    changed = soxr.resample(wave, factor * SAMPLE_RATE, SAMPLE_RATE).astype(np.float32)
    out = np.zeros(length, np.float32)
    out[: min(length, len(changed))] = changed[:length]
    return out


def reverberate(wave: Wave, response: Wave) -> Wave:
    """Convolution with a room's impulse response, its strongest tap at delay 0, at the level of the dry wave."""
    response = response[int(np.abs(response).argmax()) :]
    size = 1 << (len(wave) + len(response) - 2).bit_length()
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    level = np.sqrt(_power(wave) / max(_power(wet), 1e-20))
    scaled: Wave = (wet * level).astype(np.float32)
    return scaled


def mix(wave: Wave, other: Wave, snr_db: float, share: float, rng: np.random.Generator) -> Wave:
    """Adds a stretch of `other`, at most `share` of the wave, anywhere (WavLM, arXiv 2110.13900, algorithm 1)."""
    length = int(rng.integers(0, max(1, int(share * len(wave))) + 1))
    length = min(length, len(other))
    if not length:
        return wave
    source, target = (int(rng.integers(0, n - length + 1)) for n in (len(other), len(wave)))
    out = wave.copy()
    out[target : target + length] += scale_for(wave, other, snr_db) * other[source : source + length]
    return out


def add_at_snr(wave: Wave, noise: Wave, snr_db: float) -> Wave:
    """The sum at a signal-to-noise ratio; silence stays alone."""
    return wave + scale_for(wave, noise, snr_db) * noise


def scale_for(wave: Wave, noise: Wave, snr_db: float) -> np.float32:
    """What to multiply `noise` with for that ratio; 0 if either is silent."""
    signal, other = _power(wave), _power(noise)
    return np.float32(np.sqrt(signal / other * 10 ** (-snr_db / 10))) if other > 1e-12 else np.float32(0)


def tiled(noise: Wave, length: int, rng: np.random.Generator) -> Wave:
    """`length` samples of a recording from a random place, going round at its end."""
    start = int(rng.integers(len(noise)))
    return np.take(noise, np.arange(start, start + length), mode="wrap")


def _power(wave: npt.NDArray[np.floating]) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0


def _listed(name: str, folder: str, probability: float) -> list[Path]:
    if not probability:
        return []
    found = (
        sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in AUDIO) if folder else []
    )
    if not found:
        raise ConfigError(
            f"data.augment.{name}_prob={probability:g} needs audio files, and data.augment.{name}={folder!r} has none "
            f"({', '.join(AUDIO)})"
        )
    return found


def _pick(paths: list[Path], seed: np.int64) -> Path:
    return paths[int(seed) % len(paths)]


@functools.lru_cache(maxsize=KEPT)
def _load(path: Path) -> Wave:
    """The first channel at 16 kHz."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if not len(wave):
        raise ConfigError(f"{path} is empty")
    mono: Wave = wave[:, 0]
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32)
