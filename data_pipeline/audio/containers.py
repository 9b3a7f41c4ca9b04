"""Detects the format of a file by its content and finds the parts that it consists of."""

from __future__ import annotations

from typing import Final

from data_pipeline.audio import flac, mpeg, ogg, riff
from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.parts import Part

GSM_BYTES: Final = 33
"""One frame of GSM 06.10 full rate: 160 samples at 8 kHz."""
_CHUNKED: Final = ("wav", "rf64", "w64", "aiff", "caf")
_FORMS: Final = {b"WAVE": "wav", b"AVI ": "avi"}
_MAGIC: Final = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (riff.W64_RIFF, "w64"),
    (b"caff\x00\x01", "caf"),
    (b".snd", "au"),
    (b"NIST_1A\n", "nist"),
    (b"Creative Voice File\x1a", "voc"),
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"#!AMR", "amr"),
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "asf"),
    (b"FLV\x01", "flv"),
    (b"MAC ", "ape"),
    (b"wvpk", "wavpack"),
    (b"TTA1", "tta"),
    (b"\x0bw", "ac3"),
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
    if mpeg.is_mpeg_audio(source, begin, end):
        return "mpeg"
    if _repeats(source, begin, 7, lambda at: _adts_size(source.read(at, 7))):
        return "adts"
    if _repeats(source, begin, 188, lambda at: 188 * (source.read(at, 1) == b"\x47")):
        return "mpeg-ts"
    if (end - begin) >= GSM_BYTES and _repeats(
        source, begin, GSM_BYTES, lambda at: GSM_BYTES * (source.read(at, 1)[0] >> 4 == 13), count=16
    ):
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
        return flac.flac_parts(source, begin, end, mpeg.after_tags(source, begin, end)), end
    if kind == "ogg":
        return ogg.ogg_parts(source, begin, end)
    if kind == "mpeg":
        return mpeg.mpeg_parts(source, begin, end), end
    if kind == "mp4":
        return _boxed(source, begin, end)
    if kind == "matroska":
        return _matroska(source, begin, end)
    if kind == "amr":
        return _split_at(source, begin, end, source.read(begin, 15).split(b"\n")[0] + b"\n"), end
    if kind == "gsm":
        whole = (end - begin) // GSM_BYTES
        return [Part(((begin, begin + whole * GSM_BYTES),), whole * 160, 160, format="gsm")], end
    if kind == "avi":
        promised = begin + 8 + int.from_bytes(source.read(begin + 4, 4), "little")
        if promised > end + 1 and not riff.is_placeholder(promised - begin - 8):
            raise AudioError("truncated", f"its header states {promised - end:,} bytes more than the file has")
    return [Part(() if begin == 0 else ((begin, end),))], end


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
    header, at = _ebml_size(source, begin + 4)
    at += header or 0
    if source.read(at, 4) != b"\x18S\x80g":
        return [Part(() if begin == 0 else ((begin, end),))], end
    size, content = _ebml_size(source, at + 4)
    if size is None:
        stop, from_ = end, content
        while (found := source.find(b"\x1aE\xdf\xa3", from_, end)) >= 0:
            if b"webm" in source.read(found, 64) or b"matroska" in source.read(found, 64):
                stop = found
                break
            from_ = found + 4
    else:
        stop = content + size
    if stop > end:
        raise AudioError("truncated", f"its segment lacks {stop - end:,} bytes")
    return [Part(() if (begin, stop) == (0, end) else ((begin, stop),))], stop


def _ebml_size(source: ByteSource, at: int) -> tuple[int | None, int]:
    """Returns a variable-length size, None if it is unknown, and the position after it."""
    raw = source.read(at, 8)
    width = 9 - raw[0].bit_length() if raw and raw[0] else 8
    value = int.from_bytes(raw[:width], "big") & (1 << 7 * width) - 1
    return (None if value == (1 << 7 * width) - 1 else value), at + width


def _split_at(source: ByteSource, begin: int, end: int, magic: bytes) -> list[Part]:
    starts = [begin]
    while (found := source.find(magic, starts[-1] + len(magic), end)) >= 0:
        starts.append(found)
    if starts == [0]:
        return [Part()]
    return [Part(((start, stop),)) for start, stop in zip(starts, [*starts[1:], end], strict=True)]


def _repeats(source, begin, least, size_at, count=4) -> bool:  # type: ignore[no-untyped-def]
    """Returns whether `count` records follow each other, or fewer up to the file's end."""
    at = begin
    for _ in range(count):
        size = size_at(at) if at < source.size else 0
        if size < least:
            return False
        at += size
        if at == source.size:
            return True
    return True


def _adts_size(head: bytes) -> int:
    """Returns the size of an ADTS frame in bytes (ISO 13818-7); 0 for other data."""
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return 0
    return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
