"""Augmentation of utterances in the loader, on NumPy arrays; every draw is keyed by the segment.

Order: speed (while decoding), reverberation, other utterances, noise, gain. Lengths never change, so that
planned shapes hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np

from data_pipeline.audio.transforms import add_noise, draw_stretch, repeat_to_length, reverberate, scaled_stretch
from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, about, config

if TYPE_CHECKING:  # a training config must load without codec libraries
    from data_pipeline.audio.codecs import Wave

CACHED_RECORDINGS = 256
"""Noise recordings and impulse responses that each process keeps in memory."""
ENDINGS = (".flac", ".wav", ".ogg", ".opus", ".mp3")


@config
class AugmentConfig:
    """Augmentation of the audio as it is read, drawn by (seed, epoch, key). All of it is off by default."""

    speeds: Annotated[
        tuple[float, ...], about("speed factors, one of which is drawn for each segment, such as [0.9, 1.0, 1.1]")
    ] = ()
    rir: Annotated[str, about("folder of room impulse responses", resume="path")] = ""
    rir_prob: Annotated[float, about("probability of a room impulse response", ge=0, le=1)] = 0.0
    mix_prob: Annotated[float, about("probability that part of another utterance is mixed in", ge=0, le=1)] = 0.0
    mix_snr_db: Annotated[tuple[float, float], about("level of the utterance over the one mixed in, from and to")] = (
        -5.0,
        5.0,
    )
    mix_share: Annotated[float, about("longest mixed part as a share of the utterance", gt=0, le=1)] = 0.5
    mix_least_share: Annotated[float, about("shortest mixed part, likewise", ge=0, le=1)] = 0.0
    noise: Annotated[str, about("folder of noise recordings", resume="path")] = ""
    noise_prob: Annotated[float, about("probability of noise", ge=0, le=1)] = 0.0
    noise_snr_db: Annotated[tuple[float, float], about("level of the utterance over the noise, from and to")] = (
        -5.0,
        20.0,
    )
    gain_db: Annotated[tuple[float, float], about("gain, from and to")] = (0.0, 0.0)


class Mixture(NamedTuple):
    """An augmented utterance, wave (T,), and its clean parts, sources (S, T), as they are in it, without noise."""

    wave: Wave
    sources: Wave


class Augmenter:
    """Applies an AugmentConfig.

    Args:
        config: what is done, and how often.
        sources: utterances in a mixture (`data.sources`), whose clean parts are kept; 0: one other utterance is mixed
            in, and no part is kept.

    Raises:
        ConfigError: a required folder is missing or empty, or a range is reversed or out of bounds.
    """

    def __init__(self, config: AugmentConfig, sources: int = 0) -> None:
        self.config, self.sources = config, sources
        self.noises = _recordings("noise", config.noise, config.noise_prob)
        self.responses = _recordings("rir", config.rir, config.rir_prob)
        if any(speed < 0.5 or speed > 2 for speed in config.speeds):
            raise ConfigError(f"data.augment.speeds={list(config.speeds)}: each must be between 0.5 and 2")
        ranges = {"mix_snr_db": config.mix_snr_db, "noise_snr_db": config.noise_snr_db, "gain_db": config.gain_db}
        for name, (low, high) in ranges.items():
            if low > high:
                raise ConfigError(f"data.augment.{name}=[{low:g}, {high:g}]: the first must not be the larger one")
        if config.mix_least_share > config.mix_share:
            raise ConfigError(
                f"data.augment.mix_least_share={config.mix_least_share:g}: must be at most "
                f"data.augment.mix_share={config.mix_share:g}"
            )

    @property
    def changes_waves(self) -> bool:
        """Whether `apply` can change anything."""
        c = self.config
        return bool(c.rir_prob or c.mix_prob or c.noise_prob or c.gain_db != (0.0, 0.0))

    def speed(self, rng: np.random.Generator) -> float:
        """Draws the speed factor of a segment; 1 if none are configured."""
        return float(rng.choice(self.config.speeds)) if self.config.speeds else 1.0

    def apply(self, wave: Wave, others: Sequence[Wave], rng: np.random.Generator) -> Mixture:
        """Returns an augmented copy of an utterance, in [-1, 1].

        Every draw is made whether or not it is used, so that one setting does not shift the draws of the next.

        Args:
            wave: (T,) samples at 16 kHz.
            others: clean utterances of its micro-batch that may be mixed in. Without sources that includes `wave`
                itself; with sources they are of other segments, and each is used once at most.
            rng: keyed by (seed, epoch, key).

        Returns:
            The utterance and, with sources, its parts. They are all silent where too few others were there.
        """
        c, out = self.config, wave
        chances = rng.random(3)
        seeds = rng.integers(0, 2**63, 4)
        if chances[0] < c.rir_prob:
            out = reverberate(out, _read(_pick(self.responses, seeds[0])))
        parts = np.zeros((self.sources, len(wave)), np.float32)
        if self.sources:
            parts[0] = out
        if chances[1] < c.mix_prob:
            draw, left = np.random.default_rng(seeds[1]), list(others)
            main, wanted = out, max(self.sources - 1, 1)
            if self.sources and len(left) < wanted:
                parts[:], wanted = 0, 0
            for place in range(1, 1 + min(wanted, len(left))):
                other = left.pop(int(draw.integers(len(left))))
                part = mixed_part(main, other, draw.uniform(*c.mix_snr_db), (c.mix_least_share, c.mix_share), draw)
                out = out + part
                if self.sources:
                    parts[place] = part
        if chances[2] < c.noise_prob:
            draw = np.random.default_rng(seeds[2])
            noise = repeat_to_length(_read(_pick(self.noises, seeds[2])), len(out), draw)
            out = add_noise(out, noise, draw.uniform(*c.noise_snr_db))
        if c.gain_db != (0.0, 0.0):
            gain = np.float32(10 ** (np.random.default_rng(seeds[3]).uniform(*c.gain_db) / 20))
            out, parts = out * gain, parts * gain
        return Mixture(np.clip(out, -1, 1).astype(np.float32), parts)


def mixed_part(wave: Wave, other: Wave, snr_db: float, shares: tuple[float, float], rng: np.random.Generator) -> Wave:
    """Returns what is added to `wave`, (T,): a stretch of `other` at any position, zeros around it.

    Args:
        wave: (T,) samples.
        other: another utterance.
        snr_db: level of `wave` over it.
        shares: shortest and longest stretch as a share of `wave`.
        rng: draws length and positions.
    """
    import torch

    shortest, longest = (int(share * len(wave)) for share in shares)
    stretch = draw_stretch(rng, len(wave), len(other), longest=max(1, longest), shortest=shortest)
    out = np.zeros_like(wave)
    added = scaled_stretch(torch.from_numpy(wave), torch.from_numpy(other), stretch, snr_db)
    out[stretch.at : stretch.at + stretch.length] = added.numpy()
    return out


def _recordings(name: str, folder: str, probability: float) -> list[Path]:
    if not probability:
        return []
    found = (
        sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in ENDINGS)
        if folder
        else []
    )
    if not found:
        raise ConfigError(
            f"data.augment.{name}_prob={probability:g} needs audio files, and data.augment.{name}={folder!r} has none "
            f"({', '.join(ENDINGS)})"
        )
    return found


def _pick(paths: list[Path], seed: np.int64) -> Path:
    return paths[int(seed) % len(paths)]


@functools.lru_cache(maxsize=CACHED_RECORDINGS)
def _read(path: Path) -> Wave:
    from data_pipeline.audio.codecs import AudioError, read_mono

    try:
        return read_mono(str(path))
    except AudioError as error:
        raise DamagedFileError(f"data.augment: {error}; remove the file or repair it") from None
