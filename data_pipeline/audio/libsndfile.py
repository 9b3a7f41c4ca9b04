"""Decoding by libsndfile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import soundfile

from data_pipeline.audio.byte_source import ByteSource, PieceFile
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.mpeg import CLAIM
from data_pipeline.audio.parts import Part

Block = npt.NDArray[np.float32]
MIN_RATE, MAX_RATE, MAX_CHANNELS = 4_000, 384_000, 64
"""Plausible limits for recordings of speech (rates in Hz); a header beyond them is damaged."""
BLOCK_VALUES: Final = 1 << 18
"""Values (frames × channels) decoded at a time: few enough to stay in a core's cache."""
GSM_FORMAT: Final = {"format": "RAW", "subtype": "GSM610", "samplerate": 8_000, "channels": 1}


@dataclass(frozen=True)
class AudioInfo:
    """Description of a recording from its header."""

    sample_rate: int
    channels: int
    frames: int
    """Samples per channel; 0 if the header does not state them."""
    codec: str

    @property
    def seconds(self) -> float:
        """Duration as the header states it."""
        return self.frames / self.sample_rate


class _Forward(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file that is read without seeking: the binding otherwise seeks after each block, which decodes FLAC twice."""

    def seekable(self) -> bool:
        return False


def open_part(source: ByteSource, part: Part) -> soundfile.SoundFile:
    """Opens a part. Raises LibsndfileError if libsndfile does not know its format."""
    options: dict[str, Any] = GSM_FORMAT if part.format == "gsm" else {}
    pieces = part.pieces or ((0, source.size),)
    # by descriptor: given a path, the binding would treat every *.raw as raw samples; it closes it also on error
    by_descriptor = not part.pieces and source.path
    sound = _Forward(source.descriptor() if by_descriptor else PieceFile(source, pieces), **options)
    if part.read_to_end and part.frames is not None and not part.md5 and sound.frames < part.frames:
        # MPEG audio without a header frame: libmpg123 underestimates its length
        sound.close()
        sound = _Forward(PieceFile(source, pieces, CLAIM))
    return sound


def info_of(sound: soundfile.SoundFile) -> AudioInfo:
    """Returns the description of an open file. Raises AudioError."""
    # libsndfile reports 2^63-1 frames for an unknown length
    frames = sound.frames if 0 <= sound.frames < 1 << 48 else 0
    return require_plausible(AudioInfo(sound.samplerate, sound.channels, frames, f"{sound.format}/{sound.subtype}"))


def require_plausible(info: AudioInfo) -> AudioInfo:
    """Returns `info`. Raises AudioError if its rate or channel count is implausible."""
    if not MIN_RATE <= info.sample_rate <= MAX_RATE:
        raise AudioError("sample_rate", f"{info.sample_rate:,} Hz; allowed are {MIN_RATE:,} to {MAX_RATE:,}")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise AudioError("channels", f"{info.channels} channels; allowed are 1 to {MAX_CHANNELS}")
    return info


def read_blocks(sound: soundfile.SoundFile, limit: int | None) -> Iterator[Block]:
    """Yields (frames, channels) blocks up to `limit` frames or, without one, to the end."""
    size, left = max(BLOCK_VALUES // sound.channels, 1), 1 << 62 if limit is None else limit
    while left > 0 and len(block := sound.read(min(size, left), dtype="float32", always_2d=True)):
        left -= len(block)
        yield block
