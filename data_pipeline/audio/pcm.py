"""Raw 16-bit little-endian mono PCM as audio at 16 kHz."""

from __future__ import annotations

from typing import Final

import numpy as np
import soxr

from data_pipeline.audio.downmix import Wave
from data_pipeline.core.types import SAMPLE_RATE

SCALE: Final = np.float32(1 / 32768)


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
