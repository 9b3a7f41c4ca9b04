"""Decoding with FFmpeg's libraries, which the package av (PyAV) contains."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.audio.byte_source import ByteSource, PieceFile
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.libsndfile import AudioInfo, require_plausible
from data_pipeline.audio.parts import Part

Block = npt.NDArray[np.float32]
FORMATS: Final = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,flac,flv,g722,g726,gsm,matroska,webm,mov,mp3,mp4,mpeg,mpegts,nistspeech,"
    "ogg,tta,voc,wav,w64,wv"
)
"""Demuxers that FFmpeg may use; those that open further files or addresses are excluded."""
EXACT_FORMATS: Final = ("aiff", "ape", "caf", "flac", "mov", "tta", "w64", "wav", "wv")
"""Containers that store the stream duration instead of estimating it; the decoded audio may be a little shorter."""
TIMED_FORMATS: Final = ("asf", "flv", "matroska", "mov", "mpeg", "mpegts", "ogg")
"""Containers that store time stamps; for other containers FFmpeg derives them from the first frame's rate."""
GAP_SECONDS: Final = 0.05
"""Smallest jump in time stamps that counts as a gap and becomes silence: Matroska rounds to milliseconds."""
JUMP_SECONDS: Final = 10.0
"""In formats whose clock may be reset (MPEG-TS, FLV), a larger jump is a reset and not a gap."""
LONGEST_GAP: Final = 6 * 3600.0
BATCH: Final = 1 << 15
"""Frames per yielded block."""
_SCALES: Final = {"u8": 1 / 128, "s16": 1 / 32_768, "s32": 1 / 2_147_483_648, "flt": 1.0, "dbl": 1.0}


def load(error: Exception) -> Any:
    """Returns PyAV. Raises AudioError naming the package if it is not installed; `error` is libsndfile's."""
    if importlib.util.find_spec("av") is None:
        raise AudioError("unreadable", f"libsndfile cannot read it ({error}); FFmpeg may: pip install av") from None
    import av

    av.logging.set_level(None)
    return av


@contextlib.contextmanager
def opened(av: Any, source: ByteSource, part: Part) -> Iterator[Any]:
    """Opens a part. Raises AudioError, also for errors while reading it."""
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    whole = not part.pieces and source.path
    # "file:" keeps names with colons from being read as addresses
    file = f"file:{source.path}" if whole else PieceFile(source, part.pieces or ((0, source.size),))
    try:
        with av.open(file, options=options, metadata_errors="ignore", format=part.format or None) as container:
            if not container.streams.audio:
                raise AudioError("unreadable", "contains no audio")
            yield container
    except (av.error.FFmpegError, ValueError, IndexError, EOFError, OverflowError) as error:
        if isinstance(error, AudioError | FileNotFoundError):
            raise
        raise AudioError("unreadable", f"neither libsndfile nor FFmpeg can decode it: {str(error)[:200]}") from None


def info_of(container: Any) -> AudioInfo:
    """Returns the description of the first audio stream. Raises AudioError."""
    stream = container.streams.audio[0]
    codec = stream.codec_context
    rate = int(codec.sample_rate or 0) if codec is not None else 0
    if not rate:
        raise AudioError("unreadable", "neither libsndfile nor FFmpeg finds audio in it")
    seconds = float(stream.duration * stream.time_base) if stream.duration and stream.duration > 0 else 0.0
    return require_plausible(AudioInfo(rate, int(codec.channels or 0), round(seconds * rate), str(codec.name)))


def stored_seconds(container: Any) -> float:
    """Returns the duration in seconds that the container stores for its first audio stream; 0 if it is an estimate."""
    stream = container.streams.audio[0]
    if not set(container.format.name.split(",")) & set(EXACT_FORMATS) or not stream.duration:
        return 0.0
    return max(float(stream.duration * stream.time_base), 0.0)


def read_blocks(container: Any, md5: Any = None) -> Iterator[tuple[int, Block, bool]]:
    """Yields (rate, samples (frames, channels), whether they were decoded) of the first audio stream.

    Rates and channels are those of each decoded frame: a codec's header need not state them (HE-AAC), and they may
    change. A gap in the time stamps is filled with silence, marked as not decoded.

    Args:
        container: a container from `opened`.
        md5: a `FlacChecksum` that is updated with the samples.
    """
    waiting: list[Block] = []
    rate, held, clock = 0, 0, _Clock(set(container.format.name.split(",")))
    for frame in container.decode(audio=0):
        samples = _floats(frame, md5)
        require_plausible(AudioInfo(int(frame.sample_rate), samples.shape[1], 0, ""))
        gap = clock.gap(frame)
        if waiting and (gap or held >= BATCH or frame.sample_rate != rate or samples.shape[1] != waiting[0].shape[1]):
            yield rate, np.concatenate(waiting), True
            waiting, held = [], 0
        rate = int(frame.sample_rate)
        while gap > 0:
            yield rate, np.zeros((min(gap, BATCH), samples.shape[1]), np.float32), False
            gap -= BATCH
        waiting.append(samples)
        held += len(samples)
    if waiting:
        yield rate, np.concatenate(waiting), True


class _Clock:
    """Compares time stamps with the number of samples decoded."""

    def __init__(self, formats: set[str]) -> None:
        self.timed = bool(formats & set(TIMED_FORMATS))
        self.may_reset = bool(formats & {"mpegts", "flv", "mpeg"})
        self.now: float | None = None

    def gap(self, frame: Any) -> int:
        """Returns how many samples are missing before `frame`. Raises AudioError for an implausible gap."""
        stamp: float | None = frame.time
        length = frame.samples / frame.sample_rate
        if stamp is None or not self.timed:
            self.now = None if self.now is None else self.now + length
            return 0
        ahead = 0.0 if self.now is None else stamp - self.now
        self.now = stamp + length
        if ahead < GAP_SECONDS or (self.may_reset and ahead > JUMP_SECONDS):
            # keep the difference, so that small ones accumulate into a gap
            self.now -= ahead if 0 < ahead < GAP_SECONDS else 0.0
            return 0
        if ahead > LONGEST_GAP:
            raise AudioError("corrupt", f"its time stamps jump by {ahead:,.0f} s at {stamp - ahead:,.1f} s")
        rate: int = frame.sample_rate
        return round(ahead * rate)


def _floats(frame: Any, md5: Any) -> Block:
    """Returns the samples of a frame, (frames, channels), in [-1, 1]."""
    kind = frame.format.name.removesuffix("p")
    if kind not in _SCALES:
        raise AudioError("unreadable", f"samples of type {frame.format.name} are not supported")
    values = frame.to_ndarray()
    channels = len(frame.layout.channels)
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    if md5 is not None:
        md5.update(values)
    if kind == "u8":
        values = values.astype(np.float32) - 128
    scaled: Block = np.ascontiguousarray(values, dtype=np.float32) * np.float32(_SCALES[kind])
    return scaled


class FlacChecksum:
    """MD5 of samples as in STREAMINFO: little-endian integers of the fewest bytes that hold a sample."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._md5 = hashlib.md5(usedforsecurity=False)

    def update(self, values: npt.NDArray[Any]) -> None:
        """Adds (frames, channels) integers, which FFmpeg aligns to the top of 16 or 32 bits."""
        width = (self.bits + 7) // 8
        shifted = np.ascontiguousarray(values) >> (8 * values.dtype.itemsize - self.bits)
        raw = shifted.astype(f"<i{values.dtype.itemsize}").view(np.uint8)
        self._md5.update(raw.reshape(-1, values.dtype.itemsize)[:, :width].tobytes())

    def digest(self) -> bytes:
        """Returns the checksum of all samples added."""
        return self._md5.digest()
