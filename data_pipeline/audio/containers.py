"""Detects the format of a file by its content and finds the parts that it consists of."""

from __future__ import annotations

import functools
from typing import Final

from data_pipeline.audio import extents, flac, mpeg, ogg, riff
from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.extents import GSM_BYTES, SIZES, TS_BYTES, Sizes
from data_pipeline.audio.parts import Part
from data_pipeline.audio.signatures import ASF_HEADER, EBML, W64_RIFF

_CHUNKED: Final = ("wav", "rf64", "w64", "aiff", "caf")
_FRAMED: Final = ("adts", "ac3", "gsm")
"""Formats without a header of their own: frames that continue after zeros belong to the same file."""
_TIMED: Final = ("mpeg-ts", "mpeg-ps")
"""Formats whose time stamps show what is missing and where another file of the format follows."""
_RESYNCED: Final = (*_TIMED, "flv", "asf", "ape", "matroska", "mp4", "avi")
"""Formats whose decoder continues after unknown data."""
_FORMS: Final = {b"WAVE": "wav", b"AVI ": "avi"}
_MAGIC: Final = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (W64_RIFF, "w64"),
    (b"caff\x00\x01", "caf"),
    (b".snd", "au"),
    (b"NIST_1A\n", "nist"),
    (b"Creative Voice File\x1a", "voc"),
    (EBML, "matroska"),
    (b"#!AMR", "amr"),
    (ASF_HEADER, "asf"),
    (b"FLV\x01", "flv"),
    (b"MAC ", "ape"),
    (b"wvpk", "wavpack"),
    (b"TTA1", "tta"),
    (b"\x00\x00\x01\xba", "mpeg-ps"),
)


def sniff(source: ByteSource, begin: int = 0) -> str:
    """Returns the format of the data at byte `begin` ("wav", "flac", "mpeg", …); "" if it is not known as audio."""
    end, head = source.size, source.read(begin, 40)
    if head[:4] in (b"RIFF", b"RIFX"):
        return _FORMS.get(head[8:12], "")
    if head[:4] in (b"RF64", b"BW64"):
        return "rf64" if head[8:12] == b"WAVE" else ""
    if head[:4] == b"FORM":
        return "aiff" if head[8:12] in (b"AIFF", b"AIFC") else ""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"skip"):
        return "mp4"
    if head[:3] == b"ID3":
        behind = mpeg.after_tags(source, begin, end)
        return sniff(source, behind) if behind > begin else ""
    if mpeg.is_mpeg_audio(source, mpeg.after_tags(source, 0, end) if begin == 0 else begin, end):
        return "mpeg"  # zeros before it are padding, or audio that is lost
    if _repeats(source, begin, SIZES["adts"]):
        return "adts"
    if _repeats(source, begin, SIZES["ac3"]):
        return "ac3"
    if _repeats(source, begin, lambda source, at: TS_BYTES * (source.read(at, 1) == b"\x47")):
        return "mpeg-ts"
    if (end - begin) >= GSM_BYTES and _repeats(source, begin, SIZES["gsm"], count=16):
        return "gsm"
    return ""


def examine(source: ByteSource) -> list[Part]:
    """Returns the parts of a file in order; a single part, the whole file, if its format is unknown.

    Raises:
        AudioError: `truncated` or `corrupt` where the file's structure shows it, `trailing_data` where bytes follow
            the audio that are neither tags nor audio.
    """
    parts: list[Part] = []
    begin = 0
    while begin < source.size:
        kind = sniff(source, begin)
        if not kind:
            if parts:
                _require_ignorable(source, begin)
            break
        found, end = _parts(source, begin, kind)
        parts += found
        if end <= begin:
            break
        begin = end if end < source.size and sniff(source, end) else mpeg.after_tags(source, end, source.size)
        overwritten = end < begin < source.size and source.read(end, 1) == b"\0"
        if kind in _FRAMED and overwritten and sniff(source, begin) in ("", kind):
            raise AudioError("corrupt", f"{begin - end:,} bytes in the middle, at byte {end:,}, are not audio")
    return parts or [Part()]


def _parts(source: ByteSource, begin: int, kind: str) -> tuple[list[Part], int]:
    """Returns the parts of the container at byte `begin`, and where they end."""
    end = source.size
    if kind in _CHUNKED:
        return riff.chunked_parts(source, begin, end, kind)
    if kind == "au":
        return riff.au_parts(source, begin, end)
    if kind == "nist":
        return riff.nist_parts(source, begin, end)
    if kind == "flac":
        return flac.flac_parts(
            source, begin, end, mpeg.after_tags(source, begin, end), functools.partial(_behind_tags, source)
        )
    if kind == "ogg":
        return ogg.ogg_parts(source, begin, end)
    if kind == "mpeg":
        return mpeg.mpeg_parts(source, begin, end, functools.partial(sniff, source))
    if kind == "mp4":
        return _boxed(source, begin, end)
    if kind == "matroska":
        return _matroska(source, begin, end)
    if kind == "avi":
        stop = riff.avi_end(source, begin, end)
    else:
        tagged = source.read(begin, 3) == b"ID3"
        stop = extents.file_end(source, mpeg.after_tags(source, begin, end) if tagged else begin, end, kind)
    if kind == "gsm":
        whole = (stop - begin) // GSM_BYTES
        return [Part(((begin, begin + whole * GSM_BYTES),), whole * 160, 160, format="gsm")], stop
    return _bounded(source, begin, stop, kind)


def _bounded(source: ByteSource, begin: int, stop: int, kind: str) -> tuple[list[Part], int]:
    """Returns the part from `begin` to `stop`, or to the file's end where its decoder reads what follows."""
    behind = _behind_tags(source, stop)
    if stop <= begin or (not behind and kind in _RESYNCED) or (behind == kind and kind in _TIMED):
        stop = source.size
    return [Part(() if (begin, stop) == (0, source.size) else ((begin, stop),))], stop


def _behind_tags(source: ByteSource, at: int) -> str:
    """Returns the format of the data at byte `at`, or behind the tags there."""
    return sniff(source, at) or sniff(source, mpeg.after_tags(source, at, source.size))


def _require_ignorable(source: ByteSource, begin: int) -> None:
    """Raises AudioError if more than padding follows the audio."""
    left = source.size - begin
    if left > riff.IGNORED_BYTES:
        raise AudioError(
            "trailing_data",
            f"{left:,} bytes after its audio, from byte {begin:,} on, belong to no chunk or tag: the length in its "
            "header may be too low",
        )


def _boxed(source: ByteSource, begin: int, end: int) -> tuple[list[Part], int]:
    """Parses MP4 and related formats (ISO 14496-12): boxes of known size; a second ftyp begins another file."""
    at, seen = begin, set[bytes]()
    while at + 8 <= end:
        head = source.read(at, 16)
        size, name = int.from_bytes(head[:4], "big"), head[4:8]
        size = int.from_bytes(head[8:16], "big") if size == 1 else end - at if size == 0 else size
        if name == b"ftyp" and {b"moov", b"mdat"} <= seen:
            break
        if not all(32 <= letter < 127 or letter == 0xA9 for letter in name) or size < 8:
            break
        if at + size > end:
            raise AudioError("truncated", f"its {name.decode('latin-1')} box lacks {at + size - end:,} bytes")
        seen.add(name)
        at += size
    return [Part(() if (begin, at) == (0, end) else ((begin, at),))], at


def _matroska(source: ByteSource, begin: int, end: int) -> tuple[list[Part], int]:
    """Parses Matroska and WebM (RFC 9559): an EBML header and segments; a live stream's segment has no size."""
    header, at = extents.ebml_size(source, begin + 4)
    at += header or 0
    if source.read(at, 4) != b"\x18S\x80g":
        return [Part(() if begin == 0 else ((begin, end),))], end
    size, content = extents.ebml_size(source, at + 4)
    if size is None:
        return _bounded(source, begin, extents.cluster_end(source, content, end), "matroska")
    stop = content + size
    if stop > end:
        raise AudioError("truncated", f"its segment lacks {stop - end:,} bytes")
    return [Part(() if (begin, stop) == (0, end) else ((begin, stop),))], stop


def _repeats(source: ByteSource, begin: int, size_at: Sizes, count: int = 4) -> bool:
    """Returns whether `count` records follow each other, or fewer up to the file's end."""
    at = begin
    for _ in range(count):
        size = size_at(source, at) if at < source.size else 0
        if not size:
            return False
        at += size
        if at == source.size:
            return True
    return True
