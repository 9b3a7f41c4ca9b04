"""Decodes the samples of shards: encoded audio in memory, read by libsndfile alone.

Recordings, which may be of any format, go through `codecs.decode`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Final

import numpy as np
import numpy.typing as npt
import soundfile

from data_pipeline.audio.errors import AudioError

BLOCK_VALUES: Final = 1 << 18
"""Values (frames × channels) decoded at a time when counting: a file of a few MB may claim hours of audio."""


class Sample:
    """An encoded sample that is open for reading.

    Args:
        content: Its bytes, or an open file with them.

    Raises:
        AudioError: It is not audio that libsndfile knows (`corrupt`).
    """

    def __init__(self, content: bytes | memoryview | IO[bytes]) -> None:
        file = io.BytesIO(content) if isinstance(content, bytes | memoryview) else content
        with _audio_errors():
            self._sound = soundfile.SoundFile(file)
        self.rate: int = self._sound.samplerate
        """Hz."""
        self.channels: int = self._sound.channels
        self.frames: int = self._sound.frames
        """Length by the header, in samples per channel; it may be wrong."""

    def read(
        self, start: int = 0, count: int = -1, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Decodes a part of the sample.

        Args:
            start: First sample of the part.
            count: Largest number of samples to decode, which limits the memory; -1 decodes to the end.
            out: (count,), receives the audio.

        Returns:
            (T,) float32 in [-1, 1], or (T, channels) if there are several; T < `count` where the sample ends earlier.

        Raises:
            AudioError: It cannot be decoded (`corrupt`).
        """
        with _audio_errors():
            if start:
                self._sound.seek(start)
            wave: npt.NDArray[np.float32] = self._sound.read(count, dtype="float32", out=out)
        return wave

    def count(self, most: int | None = None) -> int:
        """Decodes block by block and returns the number of samples per channel.

        Args:
            most: Stops counting at most one block after this many samples; None counts to the end.

        Raises:
            AudioError: It cannot be decoded (`corrupt`).
        """
        frames, size = 0, max(BLOCK_VALUES // max(self.channels, 1), 1)
        with _audio_errors():
            while (most is None or frames <= most) and (got := len(self._sound.read(size, dtype="int16"))):
                frames += got
        return frames

    def close(self) -> None:
        """Frees the decoder."""
        self._sound.close()


@contextlib.contextmanager
def open_sample(content: bytes | memoryview | IO[bytes]) -> Iterator[Sample]:
    """Opens an encoded sample for the block; see `Sample` for arguments and errors."""
    sample = Sample(content)
    try:
        yield sample
    finally:
        sample.close()


@contextlib.contextmanager
def _audio_errors() -> Iterator[None]:
    try:
        yield
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError("corrupt", f"cannot be decoded ({error})") from None
