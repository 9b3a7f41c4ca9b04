"""Sound files to streams of samples and back: the only home of codec libraries.

libsndfile reads what it can (wav, flac, ogg, opus, mp3, aiff, au, sph, caf, w64 …); everything else (m4a, webm, wma,
amr, g722, video) goes through FFmpeg's libraries, which the extra `media` (PyAV) brings. A file is never in memory as a
whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import io
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE

Wave = npt.NDArray[np.float32]
MIN_RATE, MAX_RATE, MAX_CHANNELS = 4_000, 384_000, 64
"""What is plausible as speech; a header beyond these limits lies."""
OPEN_SIZE: Final = 0xFFFFFFFF
"""What programs that write to a pipe put in place of a length."""
BLOCK_VALUES: Final = 1 << 18
"""Values (frames × channels) decoded at a time: few enough to stay in a core's cache."""
MEDIA_FORMATS: Final = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,flac,flv,g722,g726,matroska,webm,mov,mp3,mp4,mpeg,mpegts,ogg,tta,wav,"
    "w64,wv"
)
"""Demuxers that FFmpeg may use: none of those that open further files or addresses."""


NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing a copy, which are not errors of the file that is read."""


class AudioError(ValueError):
    """A file that gives no usable audio; `reason` is a short code for reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return AudioError, (self.reason, str(self))


@dataclass(frozen=True)
class AudioInfo:
    """What a header says."""

    sample_rate: int
    channels: int
    frames: int
    """0 where the header does not say."""
    codec: str

    @property
    def seconds(self) -> float:
        """Duration as the header says it."""
        return self.frames / self.sample_rate


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Gives a local path with the content of `path`, which may be an fsspec URL.

    Raises:
        AudioError: There is no such file (`vanished`), or it cannot be read now (`read_error`).
        OSError: There is no room for the copy.
    """
    if not is_url(path):
        yield path.removeprefix("file://")
        return
    with tempfile.TemporaryDirectory(prefix="auricle-") as folder:
        target = str(Path(folder, "audio" + Path(path).suffix))
        try:
            fs, remote = fsspec.core.url_to_fs(path)
            fs.get_file(remote, target)
        except FileNotFoundError:
            raise AudioError("vanished", "is not there any more") from None
        except Exception as error:  # every protocol of fsspec has its own exceptions
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise OSError(error.errno, f"no room in {folder} for a copy of {path}") from None
            raise AudioError("read_error", f"cannot be read: {type(error).__name__}: {error}") from None
        yield target


def probe(path: str) -> AudioInfo:
    """Reads the header of a local file. Raises AudioError."""
    with _no_os_errors():
        try:
            with _libsndfile(path) as sound:
                return _checked(_info(sound))
        except soundfile.LibsndfileError as error:
            av = _av(error)
        with _media(av, path) as container:
            return _checked(_media_info(container))


def decode(path: str, rate: int, channel: int | None = None) -> Iterator[Wave]:
    """The audio of a local file as mono float32 blocks at `rate` Hz. Raises AudioError, also half-way.

    Channels are averaged, unless they cancel each other out: then the first one is taken. `channel`: take that one
    alone, counted from 0.
    """
    with _no_os_errors():
        source = _libsndfile_blocks(path)
        try:
            info = next(source)
        except soundfile.LibsndfileError as error:
            source = _media_blocks(_av(error), path)
            info = next(source)
        assert isinstance(info, AudioInfo)
        mono = _mono if channel is None else functools.partial(_one_channel, channel=channel)
        yield from _resampled(mono(_finite(_whole(source, info))), info.sample_rate, rate)


def read_mono(path: str, rate: int = SAMPLE_RATE) -> Wave:
    """Returns all of a recording as one array.

    Args:
        path: local path or fsspec URL.
        rate: Hz.

    Returns:
        (T,) float32 in [-1, 1], the mean of the channels.

    Raises:
        AudioError: naming the file.
    """
    try:
        with local_copy(path) as local:
            return np.concatenate(list(decode(local, rate)))
    except AudioError as error:
        raise AudioError(error.reason, f"{path}: {error}") from None


def encode(wave: npt.NDArray[np.int16], rate: int, codec: str) -> bytes:
    """Mono audio as `flac` (16 bit), `wav` (16 bit) or `opus` bytes; the same input gives the same bytes."""
    formats = {"flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "opus": ("OGG", "OPUS")}
    form, subtype = formats[codec]
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return _with_fixed_serial(buffer.getvalue()) if codec == "opus" else buffer.getvalue()


def stored_flac(path: str, wave: npt.NDArray[np.int16], rate: int) -> bytes | None:
    """The bytes of a local FLAC file without its tags, if it holds just `wave`: encoding it anew would gain nothing.

    Judged by its STREAMINFO (RFC 9639): rate, one channel, 16 bits, length, and the MD5 of its samples.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"fLaC" or os.fstat(file.fileno()).st_size > 4 * len(wave) + 65_536:
            return None
        content = file.read()
    info, fields = content[4:38], int.from_bytes(content[14:22], "big")
    expected = rate << 44 | 0 << 41 | (16 - 1) << 36 | len(wave)
    if content[0] & 0x7F or fields != expected or hashlib.md5(wave.data, usedforsecurity=False).digest() != info[18:]:
        return None
    at, last = 0, False
    while not last and at + 4 <= len(content):
        last = bool(content[at] & 0x80)
        at += 4 + int.from_bytes(content[at + 1 : at + 4], "big")
    return b"fLaC\x80\x00\x00\x22" + info + content[at:]


def to_int16(wave: Wave) -> npt.NDArray[np.int16]:
    """[-1, 1) to 16 bit; exact for audio that was 16 bit before. What is beyond full scale is clipped."""
    scaled = wave * np.float32(32768.0)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype(np.int16)


def library_versions() -> dict[str, str]:
    """The libraries that decide the bytes of a shard."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"libsndfile": soundfile.__libsndfile_version__}
    for package in ("soxr", "av", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@contextlib.contextmanager
def _no_os_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise AudioError("vanished", "is not there any more") from None
    except OSError as error:
        raise AudioError("read_error", f"cannot be read: {error.strerror or error}") from None
    except (soundfile.SoundFileError, RuntimeError, MemoryError) as error:
        raise AudioError("corrupt", f"breaks off while being decoded: {str(error)[:200]}") from None


class _Forward(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Read from begin to end: the binding otherwise seeks after each block, and FLAC decodes a frame again for that."""

    def seekable(self) -> bool:
        return False


def _libsndfile(path: str, whole: bool = False) -> soundfile.SoundFile:
    """Raises AudioError for what is no file with bytes in it and, with `whole`, for one that is cut short."""
    # by descriptor: given a name, the binding trusts its ending where that is .raw
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        os.close(handle)
        regular = stat.S_ISREG(status.st_mode)
        raise AudioError(*("empty", "is an empty file") if regular else ("no_file", "is no regular file"))
    missing = _missing_bytes(handle) if whole else 0
    if missing:
        os.close(handle)
        raise AudioError("truncated", f"its header promises {missing:,} bytes more than there are")
    return _Forward(handle)  # libsndfile closes it, also when it fails


def _info(sound: soundfile.SoundFile) -> AudioInfo:
    # libsndfile says 2^63-1 frames where it does not know
    frames = sound.frames if 0 <= sound.frames < 1 << 48 else 0
    return AudioInfo(sound.samplerate, sound.channels, frames, f"{sound.format}/{sound.subtype}")


def _checked(info: AudioInfo) -> AudioInfo:
    if not MIN_RATE <= info.sample_rate <= MAX_RATE:
        raise AudioError("sample_rate", f"{info.sample_rate:,} Hz; allowed are {MIN_RATE:,} to {MAX_RATE:,}")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise AudioError("channels", f"{info.channels} channels; allowed are 1 to {MAX_CHANNELS}")
    return info


def _libsndfile_blocks(path: str) -> Iterator[Any]:
    """First the AudioInfo, then blocks (frames, channels)."""
    with _libsndfile(path, whole=True) as sound:
        info = _checked(_info(sound))
        yield info
        frames, left = max(BLOCK_VALUES // info.channels, 1), info.frames or 1 << 62
        while left > 0 and len(block := sound.read(min(frames, left), dtype="float32", always_2d=True)):
            left -= len(block)
            yield block


def _av(error: Exception) -> Any:
    if importlib.util.find_spec("av") is None:
        raise AudioError(
            "unreadable",
            f"libsndfile cannot read it ({error}); FFmpeg may: pip install 'auricle[media]'",
        ) from None
    import av

    av.logging.set_level(None)
    return av


@contextlib.contextmanager
def _media(av: Any, path: str) -> Iterator[Any]:
    options = {"protocol_whitelist": "file", "format_whitelist": MEDIA_FORMATS}
    try:
        # "file:" keeps names with colons from being read as addresses
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError("unreadable", "holds no audio")
            yield container
    except (av.error.FFmpegError, ValueError, IndexError, EOFError, OverflowError) as error:
        if isinstance(error, AudioError | FileNotFoundError):
            raise
        raise AudioError("unreadable", f"neither libsndfile nor FFmpeg can decode it: {str(error)[:200]}") from None


def _media_info(container: Any) -> AudioInfo:
    stream = container.streams.audio[0]
    codec = stream.codec_context
    rate = int(codec.sample_rate or 0) if codec is not None else 0
    if not rate:
        raise AudioError("unreadable", "neither libsndfile nor FFmpeg finds audio in it")
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    return AudioInfo(rate, int(codec.channels or 0), round(seconds * rate), str(codec.name))


def _media_blocks(av: Any, path: str) -> Iterator[Any]:
    with _media(av, path) as container:
        info = _checked(_media_info(container))
        yield info
        resampler = av.AudioResampler(format="fltp", rate=info.sample_rate)
        for frame in container.decode(audio=0):
            for planar in resampler.resample(frame):
                yield np.ascontiguousarray(planar.to_ndarray().T, dtype=np.float32)
        for planar in resampler.resample(None):
            yield np.ascontiguousarray(planar.to_ndarray().T, dtype=np.float32)


def _whole(blocks: Iterator[Wave], info: AudioInfo) -> Iterator[Wave]:
    frames = 0
    for block in blocks:
        frames += len(block)
        yield block
    if frames == 0:
        raise AudioError("no_samples", "holds no samples")
    if frames < 0.9 * info.frames:
        raise AudioError("truncated", f"gives {frames:,} of the {info.frames:,} samples that its header promises")


def _finite(blocks: Iterator[Wave]) -> Iterator[Wave]:
    for block in blocks:
        power = float(np.dot(block.ravel(), block.ravel()))
        if not power <= 100.0 * block.size:
            if np.isfinite(block).all():
                raise AudioError("scale", "its samples are far beyond full scale: integers written as floats?")
            raise AudioError("not_finite", "holds NaN or infinite samples")
        yield block


def _mono(blocks: Iterator[Wave]) -> Iterator[Wave]:
    first_only: bool | None = None
    for block in blocks:
        if block.shape[1] == 1:
            yield block[:, 0]
            continue
        mixed: Wave = block.mean(axis=1, dtype=np.float32)
        if first_only is None and (power := float(np.square(block[:, 0]).mean())) > 1e-9:
            first_only = float(np.square(mixed).mean()) < 1e-3 * power
        yield np.ascontiguousarray(block[:, 0]) if first_only else mixed


def _one_channel(blocks: Iterator[Wave], channel: int) -> Iterator[Wave]:
    for block in blocks:
        if channel >= block.shape[1]:
            raise AudioError("no_channel", f"has no channel {channel}; it has {block.shape[1]}, counted from 0")
        yield np.ascontiguousarray(block[:, channel])


def _resampled(blocks: Iterator[Wave], source: int, target: int) -> Iterator[Wave]:
    if source == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ")
    for block in blocks:
        if len(made := stream.resample_chunk(block)):
            yield made
    if len(made := stream.resample_chunk(np.zeros(0, np.float32), last=True)):
        yield made


def _missing_bytes(handle: int) -> int:
    """How many bytes a WAV, RF64, W64, AIFF or AU header promises beyond the file's end; 0 for other files."""
    head, size = os.pread(handle, 32, 0).ljust(32, b"\0"), os.fstat(handle).st_size
    if head[:4] == b"RIFF":
        promised = _end_of_data(handle)
    elif head[:4] == b"FORM":
        promised = 8 + int.from_bytes(head[4:8], "big")
    elif head[:4] == b".snd":
        length = int.from_bytes(head[8:12], "big")
        promised = 0 if length == OPEN_SIZE else int.from_bytes(head[4:8], "big") + length
    elif head[:4] == b"riff":
        promised = int.from_bytes(head[16:24], "little")
    elif head[:4] == b"RF64":
        promised = 8 + int.from_bytes(head[20:28], "little")
    else:
        promised = 0
    return max(0, promised - size)


def _end_of_data(handle: int) -> int:
    """Where the data chunk of a RIFF file ends as its header says; 0 without one."""
    at = 12
    while len(chunk := os.pread(handle, 8, at)) == 8:
        at, length = at + 8, int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            return 0 if length >= OPEN_SIZE - 255 else at + length
        at += length + length % 2
    return 0


_BIT_REVERSED: Final = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _with_fixed_serial(ogg: bytes) -> bytes:
    """An Ogg stream with serial number 1 instead of a random one: serial and checksum of each page (RFC 3533)."""
    pages, at = bytearray(ogg), 0
    while at < len(pages):
        segments = pages[at + 26]
        end = at + 27 + segments + sum(pages[at + 27 : at + 27 + segments])
        pages[at + 14 : at + 18] = struct.pack("<I", 1)
        pages[at + 22 : at + 26] = bytes(4)
        # Ogg's CRC-32 is zlib's with the bits of each byte and of the result reversed, and without inversions
        crc = zlib.crc32(bytes(pages[at:end]).translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        pages[at + 22 : at + 26] = struct.pack("<I", int(f"{crc:032b}"[::-1], 2))
        at = end
    return bytes(pages)
