"""Decodes recordings into streams of samples and encodes segments; all use of codec libraries starts here.

libsndfile reads the formats that it supports (wav, flac, ogg, opus, mp3, aiff, au, sph, caf, w64, gsm …). All other
formats (m4a, webm, wma, amr, g722, video), and files that libsndfile fails on, are read with FFmpeg's libraries, which
PyAV contains. A file is never loaded whole. The length of a recording comes from its container's
structure (`containers.examine`), never from a decoder's estimate.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import fsspec
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from data_pipeline.audio import ffmpeg, libsndfile
from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.containers import examine, sniff
from data_pipeline.audio.downmix import Downmix
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.flac import later_parts
from data_pipeline.audio.libsndfile import AudioInfo
from data_pipeline.audio.ogg import with_serial
from data_pipeline.audio.parts import Part
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE

__all__ = [
    "AudioError", "AudioInfo", "MonoOutput", "Wave", "decode", "encode", "finite", "local_copy", "no_os_errors",
    "part_blocks", "probe", "read_mono",
]  # fmt: skip

Wave = npt.NDArray[np.float32]
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing a copy, as opposed to errors of the file that is read."""
BLOCK_SAMPLES: Final = 1 << 16
"""Block size, in frames, of the silence that fills a gap."""


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yields a local path with the content of `path`, which may be an fsspec URL.

    Raises:
        AudioError: The file does not exist (`vanished`) or cannot be read (`read_error`).
        OSError: The disk is too full for the copy.
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
            raise AudioError("vanished", "no longer exists") from None
        except Exception as error:  # every protocol of fsspec has its own exceptions
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise OSError(error.errno, f"no space in {folder} for a copy of {path}") from None
            raise AudioError("read_error", f"cannot be read: {type(error).__name__}: {error}") from None
        yield target


def probe(path: str) -> AudioInfo:
    """Returns the description in the header of a local file's first part.

    Raises:
        AudioError: The file has no usable audio.
    """
    with no_os_errors(), ByteSource(path) as source:
        part = examine(source)[0]
        try:
            with libsndfile.open_part(source, part) as sound:
                return libsndfile.info_of(sound)
        except soundfile.LibsndfileError as error:
            av = ffmpeg.load(error)
        with ffmpeg.opened(av, source, part) as container:
            return ffmpeg.info_of(container)


def probe_content(path: str) -> AudioInfo | None:
    """Returns the description of a local file whose content is audio, whatever its name; None for other files.

    Headerless formats (G.722, raw PCM) cannot be recognised by content. A damaged audio file counts as audio: reading
    it gives the reason.
    """
    try:
        with no_os_errors(), ByteSource(path) as source:
            kind = sniff(source)
            if not kind:
                return None
    except AudioError:
        return None
    try:
        return probe(path)
    except AudioError as error:
        # a video without sound, or a container of something else
        return None if error.reason == "unreadable" else AudioInfo(SAMPLE_RATE, 1, 0, kind)


def decode(source: str | bytes, rate: int, channel: int | None = None) -> Iterator[Wave]:
    """Yields a recording as mono blocks of bounded size, whatever length its header states.

    All parts of a file are decoded (chained Ogg, joined MP3 and FLAC, concatenated WAV …). Rate and channel count may
    change within it. Gaps in time stamps become silence, so that later audio keeps its time. Channels are averaged,
    except where they cancel each other (see `downmix`).

    Args:
        source: Local path, or the bytes of a file.
        rate: Output rate in Hz.
        channel: Channel to take instead of the mix, counted from 0.

    Yields:
        (T,) float32 arrays in [-1, 1].

    Raises:
        AudioError: The recording is unusable. It may be raised after some blocks, which must then be discarded.
    """
    with no_os_errors(), ByteSource(source) as data:
        output, frames = MonoOutput(rate, channel), 0
        parts = examine(data)
        while parts:
            part = parts.pop(0)
            for block_rate, block in part_blocks(data, part):
                frames += len(block)
                yield from output.push(block_rate, finite(block))
            if part.may_continue:
                parts += later_parts(data)
        yield from output.flush()
        if not frames:
            raise AudioError("no_samples", "contains no samples")


def read_mono(path: str, rate: int = SAMPLE_RATE, channel: int | None = None) -> Wave:
    """Returns all of a recording as one array.

    Args:
        path: Local path or fsspec URL.
        rate: Output rate in Hz.
        channel: Channel to take instead of the mix, counted from 0.

    Returns:
        (T,) float32 in [-1, 1], mixed to mono as in `decode`.

    Raises:
        AudioError: The recording is unusable; the message names the file.
    """
    try:
        with local_copy(path) as local:
            return np.concatenate(list(decode(local, rate, channel)))
    except AudioError as error:
        raise AudioError(error.reason, f"{path}: {error}") from None


def encode(wave: npt.NDArray[np.int16], rate: int, codec: str) -> bytes:
    """Encodes mono audio; the same input gives the same bytes.

    Args:
        wave: (T,) samples.
        rate: Hz.
        codec: "flac" (16 bit), "wav" (16 bit) or "opus".
    """
    formats = {"flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "opus": ("OGG", "OPUS")}
    form, subtype = formats[codec]
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return with_serial(buffer.getvalue(), 1) if codec == "opus" else buffer.getvalue()


def stored_flac(path: str, wave: npt.NDArray[np.int16], rate: int) -> bytes | None:
    """Returns a local FLAC file without its tags if it contains exactly `wave`, which saves encoding; otherwise None.

    Decided by its STREAMINFO (RFC 9639): rate, one channel, 16 bits, length, and the MD5 of its samples.
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
    """Converts samples in [-1, 1) to 16 bit, exactly for 16-bit sources. Values beyond full scale are clipped."""
    scaled = wave * np.float32(32768.0)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype(np.int16)


@contextlib.contextmanager
def no_os_errors() -> Iterator[None]:
    """Raises the errors of reading and decoding in the block as AudioError."""
    try:
        yield
    except FileNotFoundError:
        raise AudioError("vanished", "no longer exists") from None
    except OSError as error:
        raise AudioError("read_error", f"cannot be read: {error.strerror or error}") from None
    except (soundfile.SoundFileError, RuntimeError, MemoryError) as error:
        raise AudioError("corrupt", f"decoding fails part-way: {str(error)[:200]}") from None


class MonoOutput:
    """Downmix and resampler, replaced where a recording's rate or channels change."""

    def __init__(self, rate: int, channel: int | None) -> None:
        self.rate, self.channel = rate, channel
        self._downmix: Downmix | None = None
        self._stream: soxr.ResampleStream | None = None

    def push(self, rate: int, block: Wave) -> Iterator[Wave]:
        """Yields mono audio at the output's rate. Raises AudioError (`no_channel`)."""
        if self.channel is not None:
            if self.channel >= block.shape[1]:
                raise AudioError(
                    "no_channel", f"has no channel {self.channel}; it has {block.shape[1]}, counted from 0"
                )
            block = np.ascontiguousarray(block[:, self.channel : self.channel + 1])
        if self._downmix is None or (rate, block.shape[1]) != (self._downmix.rate, self._downmix.channels):
            yield from self._end_of_channels()
            if self._downmix is None or rate != self._downmix.rate:
                yield from self._end_of_rate()
                if rate != self.rate:
                    self._stream = soxr.ResampleStream(rate, self.rate, 1, dtype="float32", quality="HQ")
            self._downmix = Downmix(rate, block.shape[1])
        for mono in self._downmix.push(block):
            yield from self._resampled(mono)

    def flush(self) -> Iterator[Wave]:
        """Yields the remaining audio."""
        yield from self._end_of_channels()
        yield from self._end_of_rate()

    def _end_of_channels(self) -> Iterator[Wave]:
        if self._downmix is not None:
            for mono in self._downmix.flush():
                yield from self._resampled(mono)

    def _end_of_rate(self) -> Iterator[Wave]:
        if self._stream is not None and len(made := self._stream.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield made
        self._stream = None

    def _resampled(self, mono: Wave) -> Iterator[Wave]:
        made = mono if self._stream is None else self._stream.resample_chunk(np.ascontiguousarray(mono))
        if len(made):
            yield made


def part_blocks(source: ByteSource, part: Part) -> Iterator[tuple[int, Wave]]:
    """Yields (rate, samples (frames, channels)) of a part, by libsndfile or, where that fails, by FFmpeg."""
    delivered, rate, promised = 0, 0, part.frames
    failed: AudioError | soundfile.LibsndfileError
    try:
        with libsndfile.open_part(source, part) as sound:
            info = libsndfile.info_of(sound)
            rate = info.sample_rate
            if promised is None and not part.read_to_end:
                promised = info.frames or None
            if part.silence:
                yield from _silence(round(part.silence * rate), rate, info.channels)
            for block in libsndfile.read_blocks(sound, None if part.read_to_end else info.frames or None):
                delivered += len(block)
                yield rate, block
            if promised is None or delivered >= promised - part.tolerance:
                return
            failed = _shortfall(delivered, promised)
    except soundfile.LibsndfileError as error:
        failed = error
    yield from _by_ffmpeg(source, part, failed, delivered, promised if delivered or rate else None)


def _by_ffmpeg(
    source: ByteSource,
    part: Part,
    failed: AudioError | soundfile.LibsndfileError,
    skip: int,
    promised: int | None,
) -> Iterator[tuple[int, Wave]]:
    """Decodes a part with FFmpeg from frame `skip` on.

    Where libsndfile failed part-way, the file is accepted only if a checksum or length proves that FFmpeg read all of
    it.
    """
    half_way = skip > 0 or promised is not None
    if half_way and not promised and not part.md5:
        raise AudioError("corrupt", f"decoding fails part-way: {str(failed)[:200]}") from None
    try:
        av = ffmpeg.load(failed)
        with ffmpeg.opened(av, source, part) as container:
            info = ffmpeg.info_of(container)
            stored = 0 if half_way else ffmpeg.stored_seconds(container)
            bits = container.streams.audio[0].codec_context.codec.name == "flac" and _flac_bits(source, part)
            md5 = ffmpeg.FlacChecksum(bits) if part.md5 and bits else None
            frames, seconds, rates = 0, 0.0, {info.sample_rate}
            if part.silence and not half_way:
                yield from _silence(round(part.silence * info.sample_rate), info.sample_rate, info.channels)
            for rate, block, decoded in ffmpeg.read_blocks(container, md5):
                seconds += len(block) / rate
                rates.add(rate)
                fresh = block[max(skip - frames, 0) :] if skip > frames else block
                frames += len(block) if decoded or not half_way else 0
                if len(fresh):
                    yield rate, fresh
    except AudioError as error:
        if not half_way or error.reason == "scale":
            raise
        raise AudioError("corrupt", f"decoding fails part-way: {str(failed)[:200]}") from None
    if md5 is not None and half_way:
        if md5.digest() != part.md5:
            raise AudioError("corrupt", f"decoding fails part-way: {str(failed)[:200]}")
    elif half_way and (promised is None or not promised - part.tolerance <= frames <= promised + part.tolerance):
        raise (
            failed
            if isinstance(failed, AudioError)
            else AudioError("corrupt", f"decoding fails part-way: {str(failed)[:200]}")
        )
    elif not half_way and seconds < 0.9 * stored and seconds:
        raise _shortfall(round(seconds * info.sample_rate), round(stored * info.sample_rate))


def _shortfall(frames: int, promised: int) -> AudioError:
    return AudioError("truncated", f"contains {frames:,} of the {promised:,} samples stated in its header")


def _flac_bits(source: ByteSource, part: Part) -> int:
    """Returns the bits per sample in the STREAMINFO of a FLAC part; 0 for other parts."""
    first = part.pieces[0] if part.pieces else (0, source.size)
    at = first[0] if isinstance(first, tuple) else 0
    head = first if isinstance(first, bytes) else source.read(at, 64)
    if head[:4] != b"fLaC":
        return 0
    return (int.from_bytes(head[18:26], "big") >> 36 & 31) + 1


def _silence(frames: int, rate: int, channels: int) -> Iterator[tuple[int, Wave]]:
    for start in range(0, frames, BLOCK_SAMPLES):
        yield rate, np.zeros((min(BLOCK_SAMPLES, frames - start), channels), np.float32)


def finite(block: Wave) -> Wave:
    """Returns a block of samples. Raises AudioError if some are not finite, or far beyond full scale."""
    power = float(np.dot(block.ravel(), block.ravel()))
    if not power <= 100.0 * block.size:
        if np.isfinite(block).all():
            raise AudioError("scale", "samples are far beyond full scale: integers written as floats?")
        raise AudioError("not_finite", "contains NaN or infinite samples")
    return block
