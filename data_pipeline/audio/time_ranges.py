"""Decodes a range of time of a long recording, found by seeking where the codec is exact to the sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from data_pipeline.audio import codecs, libsndfile
from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.containers import examine, sniff
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.flac import parts_behind
from data_pipeline.audio.libsndfile import AudioInfo
from data_pipeline.audio.parts import Part
from data_pipeline.core.types import SAMPLE_RATE

FORMATS: Final = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC")
SUBTYPES: Final = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""What libsndfile reads from any sample on exactly as from the start. MP3, AAC, Opus and Vorbis depend on what comes
before, and their time stamps are not exact to the sample."""
AROUND: Final = 1
"""Seconds that are decoded before and after a range, as context of the resampler and the downmix."""


def exact_length(path: str, least: float = 0.0) -> float:
    """Returns the seconds of a local recording that can be read exactly from any sample on; 0 for other files.

    Args:
        path: local path.
        least: seconds; recordings that are shorter by their header, which saves reading more, count as other files.
    """
    try:
        with codecs.no_os_errors(), ByteSource(path) as data:
            if sniff(data) not in ("wav", "rf64", "w64", "aiff", "au", "caf", "flac"):
                return 0.0
            with libsndfile.open_part(data, Part()) as sound:
                if libsndfile.info_of(sound).seconds < least:
                    return 0.0
            part = _only_part(data)
            with libsndfile.open_part(data, part) as sound:
                info = libsndfile.info_of(sound)
        return info.seconds if _is_exact(part, info) else 0.0
    except AudioError:
        return 0.0  # the unit that decodes it names the reason


def decode_part(path: str, part: tuple[int, int | None] | None, channel: int | None = None) -> Iterator[codecs.Wave]:
    """Yields a local recording, or a part of it from and to these seconds, as mono blocks at `SAMPLE_RATE`.

    Raises:
        AudioError: see `codecs.decode`.
    """
    if part is None:
        return codecs.decode(path, SAMPLE_RATE) if channel is None else codecs.decode(path, SAMPLE_RATE, channel)
    begin, end = part
    return decode_range(path, begin * SAMPLE_RATE, None if end is None else end * SAMPLE_RATE, channel)


def decode_range(path: str, begin: int, end: int | None, channel: int | None = None) -> Iterator[codecs.Wave]:
    """Yields a range of a local recording as mono blocks at `SAMPLE_RATE`.

    The result depends on the recording and `begin` alone: resampler and downmix start a second or two before it. The
    samples are those of `codecs.decode` up to rounding, and the same bits if the recording is mono at `SAMPLE_RATE`.

    Args:
        path: a recording with an `exact_length`.
        begin, end: samples at `SAMPLE_RATE`; end None, or beyond it: to the end of the recording.
        channel: channel to take instead of the mix, counted from 0.

    Yields:
        (T,) float32 arrays in [-1, 1].

    Raises:
        AudioError: the recording is unusable, or not exact. It may be raised after some blocks, which must then be
            discarded.
    """
    first = max(begin // SAMPLE_RATE - AROUND, 0)
    left, skip = (1 << 62 if end is None else end - begin), begin - first * SAMPLE_RATE
    stop = None if end is None else -(-end // SAMPLE_RATE) + AROUND
    output = codecs.MonoOutput(SAMPLE_RATE, channel)
    with codecs.no_os_errors(), ByteSource(path) as data:
        for made in _mono(_native(data, first, stop), output):
            wave = made[skip : skip + left]
            skip = max(skip - len(made), 0)
            left -= len(wave)
            if len(wave):
                yield wave
            if not left:
                return


def _mono(blocks: Iterator[tuple[int, codecs.Wave]], output: codecs.MonoOutput) -> Iterator[codecs.Wave]:
    for rate, block in blocks:
        yield from output.push(rate, codecs.finite(block))
    yield from output.flush()


def _native(data: ByteSource, first: int, stop: int | None) -> Iterator[tuple[int, codecs.Wave]]:
    """Yields (rate, samples (frames, channels)) between two seconds. Raises AudioError."""
    part = _only_part(data)
    with libsndfile.open_part(data, part) as sound:
        info = libsndfile.info_of(sound)
        if not _is_exact(part, info):
            raise AudioError("changed", "can no longer be read from the middle on exactly, as when it was planned")
        begin = first * info.sample_rate
        wanted = info.frames - begin if stop is None else min(stop * info.sample_rate, info.frames) - begin
        if wanted <= 0:
            raise AudioError("no_samples", f"ends before {first} s")
        sound.seek(begin)
        delivered = 0
        for block in libsndfile.read_blocks(sound, wanted):
            delivered += len(block)
            yield info.sample_rate, block
        if delivered < wanted:
            found = f"contains {begin + delivered:,} of the {info.frames:,} samples stated in its header"
            raise AudioError("truncated", found)
    # where seeking leaves the file does not tell where the stream ends, so that all of the file is searched
    for later in parts_behind(data, 42) if stop is None and part.may_continue else ():
        yield from codecs.part_blocks(data, later)


def _only_part(data: ByteSource) -> Part:
    parts = examine(data)
    return parts[0] if len(parts) == 1 else Part(read_to_end=True)


def _is_exact(part: Part, info: AudioInfo) -> bool:
    container, _, subtype = info.codec.partition("/")
    frames = info.frames if part.frames is None else part.frames
    return (
        container in FORMATS and subtype in SUBTYPES and not part.read_to_end and not part.silence
    ) and 0 < info.frames == frames
