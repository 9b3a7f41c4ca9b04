"""Raw 16-bit little-endian mono PCM as audio at 16 kHz."""

from __future__ import annotations

import string
from typing import Final

import numpy as np
import soxr

from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.containers import sniff
from data_pipeline.audio.downmix import Wave
from data_pipeline.audio.errors import AudioError
from data_pipeline.core.types import SAMPLE_RATE

SCALE: Final = np.float32(1 / 32768)
HEADER_BYTES: Final = 64
"""Enough of a sound file to know its format."""
GUESSED: Final = ("", "mpeg", "adts", "mpeg-ts", "gsm")
"""Formats that `sniff` guesses from repetitions, which raw PCM may have by chance."""
_PRINTABLE: Final = frozenset(string.printable.encode())


def from_pcm16(content: bytes | memoryview, out: Wave | None = None) -> Wave:
    """Converts 16-bit samples to float32 in [-1, 1).

    Args:
        content: whole samples, two bytes each.
        out: (T,) where to write them; None: a new array.
    """
    wave: Wave = np.multiply(np.frombuffer(content, "<i2"), SCALE, out=out)
    return wave


def to_pcm16(wave: Wave) -> bytes:
    """Returns audio as 16-bit samples, those outside of [-1, 1) cut off."""
    return np.clip(np.round(wave / SCALE), -32_768, 32_767).astype("<i2").tobytes()


def refuse_other_than_pcm(head: bytes, source: str) -> None:
    """Raises AudioError if the first bytes of a stream are those of a sound file or text.

    Args:
        head: at least HEADER_BYTES, or the whole stream.
        source: what sends it, for the message.
    """
    if len(head) >= HEADER_BYTES and (found := sniff(ByteSource(head))) not in GUESSED:
        raise AudioError("not_pcm", f"begins like a sound file ({found}); a stream must be raw 16-bit PCM")
    refuse_text(head, source)


def refuse_text(head: bytes, source: str) -> None:
    """Raises AudioError if the first bytes are all printable ASCII, which samples of audio are not."""
    if all(byte in _PRINTABLE for byte in head[:HEADER_BYTES]):
        raise AudioError("not_pcm", f"{source} is text; give a sound file, or raw 16-bit mono PCM")


class PcmStream:
    """Converts a stream of PCM part by part; the parts may have any number of bytes.

    Args:
        rate: samples per second of the stream.
    """

    def __init__(self, rate: int) -> None:
        self._resampler: soxr.ResampleStream | None = None
        if rate != SAMPLE_RATE:
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        self._odd = b""

    def push(self, content: bytes) -> Wave:
        """Returns the audio of the next bytes, (T,) at 16 kHz; half a sample waits for the next ones."""
        content = self._odd + content
        whole = len(content) // 2 * 2
        self._odd = content[whole:]
        wave = from_pcm16(content[:whole])
        return wave if self._resampler is None else self._resampler.resample_chunk(wave)

    def finish(self) -> Wave:
        """Returns the audio that resampling has held back, (T,), and drops half a sample."""
        nothing = np.zeros(0, np.float32)
        return nothing if self._resampler is None else self._resampler.resample_chunk(nothing, last=True)
