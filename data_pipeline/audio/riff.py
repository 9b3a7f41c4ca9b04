"""Chunked containers: RIFF (WAV), RF64, W64, AIFF, CAF, and the headers of AU and NIST SPHERE.

Their headers state a length in bytes. A length beyond the file's end means that the file is truncated, unless it is a
placeholder of programs that write to a pipe and cannot seek back: those mean "to the end of the file".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from data_pipeline.audio.byte_source import ByteSource, Piece
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.parts import Part
from data_pipeline.audio.signatures import W64_RIFF, next_file

W64_DATA: Final = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
LARGEST_HEADER: Final = 1 << 24
IGNORED_BYTES: Final = 4_096
"""Bytes after the audio that may belong to no chunk (padding, leftovers); more may be audio that the header omits."""
_FILES: Final = (
    *(b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"fLaC", b"OggS", b"TTA1", b"wvpk", b"MAC ", b".snd"),
    *(b"NIST", b"Crea", b"#!AM"),
)
_PCM_AIFC: Final = {b"NONE": 0, b"sowt": 0, b"twos": 0, b"raw ": 0, b"in24": 3, b"in32": 4, b"fl32": 4, b"FL32": 4,
                    b"fl64": 8, b"FL64": 8, b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}  # fmt: skip


@dataclass(frozen=True)
class Dialect:
    """Layout of a container's chunks."""

    order: Literal["little", "big"]
    id_bytes: int = 4
    size_bytes: int = 4
    header_counts: bool = False
    """Whether a chunk's size includes its header."""
    align: int = 2
    data: bytes = b"data"


RIFF, RIFX, AIFF = Dialect("little"), Dialect("big"), Dialect("big", data=b"SSND")
W64 = Dialect("little", 16, 8, header_counts=True, align=8, data=W64_DATA)
CAF = Dialect("big", size_bytes=8, align=1)


@dataclass(frozen=True)
class Chunk:
    """A chunk's name, the position of its content and the size that its header states."""

    name: bytes
    at: int
    size: int


def is_placeholder(size: int, width: int = 4) -> bool:
    """Returns whether a length in bytes is a placeholder for an unknown one.

    0, 0xFFFFFFFF (FFmpeg), 0x80000000 (arecord), 0x7FFFFFFF, 0x7FFFF000 (sox, espeak) and 0x7F000000 (sox, AIFF), or
    one of these minus a header's size; in 64 bits also anything from 2^62 on.
    """
    if size == 0 or 0x7EFF0000 <= size <= 0x7F010000 or 0x7FFE0000 <= size <= 0x80010000:
        return True
    if 0xFFFF0000 <= size <= 0xFFFFFFFF:
        return True
    return width == 8 and size >= 1 << 62


def chunked_parts(source: ByteSource, begin: int, end: int, kind: str) -> tuple[list[Part], int]:
    """Returns the parts of a chunked container, and where it ends.

    Args:
        source: the file.
        begin: position of the container's header.
        end: end of the file.
        kind: the container, as `signatures` names it.

    Raises:
        AudioError: `truncated` if the data chunk states more bytes than the file has.
    """
    first, dialect = {
        "wav": (begin + 12, RIFX if source.read(begin, 4) == b"RIFX" else RIFF),
        "rf64": (begin + 12, RIFF),
        "w64": (begin + 40, W64),
        "aiff": (begin + 12, AIFF),
        "caf": (begin + 8, CAF),
    }[kind]
    before: list[Chunk] = []
    for chunk in _chunks(source, first, end, dialect):
        if chunk.name == dialect.data:
            return _around_data(source, begin, end, kind=kind, dialect=dialect, before=before, data=chunk)
        before.append(chunk)
    return [Part(_whole(source, begin, end))], end


def _around_data(
    source: ByteSource, begin: int, end: int, kind: str, dialect: Dialect, before: list[Chunk], data: Chunk
) -> tuple[list[Part], int]:
    size, there = data.size, end - data.at
    if kind == "rf64" and size >= 0xFFFFFFFF:
        size = next((_number(source, c.at + 8, 8, "little") for c in before if c.name == b"ds64"), size)
    least = 8 if dialect is AIFF else 4 if dialect is CAF else 0  # what comes before the samples in the chunk
    unknown = is_placeholder(size, 8 if kind in ("w64", "caf", "rf64") else 4) or size <= least
    if unknown and size <= least and _ends_with_chunks(source, data.at + max(size, 0), end, dialect):
        unknown = False  # the data chunk is empty, and other chunks follow
    if not unknown and size > there:
        raise AudioError("truncated", f"its header states {size - there:,} bytes more than the file has")
    if unknown:
        end = next_file(source, data.at, end)
        slices = [(data.at, end)]
        whole = _rewritten(source, begin, kind=kind, dialect=dialect, before=before, data=data, slices=slices)
        return [Part(whole)], end
    slices, last = [(data.at, data.at + size)], data.at + size
    for chunk in _chunks(source, _aligned(last, begin, dialect), end, dialect):
        if not _is_name(chunk.name, dialect) or chunk.size > end - chunk.at:
            break
        if chunk.name == dialect.data and dialect is not AIFF:
            slices.append((chunk.at, chunk.at + chunk.size))
        last = chunk.at + chunk.size
    last = min(_aligned(last, begin, dialect), end)
    if len(slices) > 1:
        whole = _rewritten(source, begin, kind=kind, dialect=dialect, before=before, data=data, slices=slices)
        return [Part(whole)], last
    return [Part(_whole(source, begin, last if last < end else end))], last


def _whole(source: ByteSource, begin: int, end: int) -> tuple[Piece, ...]:
    """Returns the byte range; no pieces, the fastest form, if only ignorable bytes follow."""
    return () if begin == 0 and source.size - end <= IGNORED_BYTES else ((begin, end),)


def _chunks(source: ByteSource, at: int, end: int, dialect: Dialect) -> Iterator[Chunk]:
    header = dialect.id_bytes + dialect.size_bytes
    begin = at
    while at + header <= end:
        raw = source.read(at, header)
        size = int.from_bytes(raw[dialect.id_bytes :], dialect.order)
        if dialect is CAF and size >= 1 << 63:
            size = (1 << 64) - 1
        if dialect.header_counts:
            size = max(size - header, 0)
        yield Chunk(raw[: dialect.id_bytes], at + header, size)
        at = _aligned(at + header + size, begin, dialect)


def _aligned(at: int, begin: int, dialect: Dialect) -> int:
    return at + (begin - at) % dialect.align


def _is_name(name: bytes, dialect: Dialect) -> bool:
    """Returns whether this is a valid chunk name; the first bytes of a file begin another one."""
    if name[:4] in _FILES or name == W64_RIFF:
        return False
    return all(32 <= letter < 127 for letter in name[:4])


def _ends_with_chunks(source: ByteSource, at: int, end: int, dialect: Dialect) -> bool:
    for chunk in _chunks(source, at, end, dialect):
        if not _is_name(chunk.name, dialect) or chunk.at + chunk.size > end:
            return False
        at = chunk.at + chunk.size
    return end - at < 2 * dialect.align


def _number(source: ByteSource, at: int, size: int, order: Literal["little", "big"]) -> int:
    return int.from_bytes(source.read(at, size), order)


def _rewritten(
    source: ByteSource,
    begin: int,
    kind: str,
    dialect: Dialect,
    before: list[Chunk],
    data: Chunk,
    slices: list[tuple[int, int]],
) -> tuple[Piece, ...]:
    """Returns the pieces of the file with the true length in its header."""
    length = sum(stop - start for start, stop in slices)
    if data.at - begin > LARGEST_HEADER:
        raise AudioError("unreadable", f"has {data.at - begin:,} bytes of header")
    if kind in ("wav", "rf64"):
        return (_wave_header(source, dialect, before, length), *slices)
    header = bytearray(source.read(begin, data.at - begin))
    if kind == "w64":
        header[16:24] = struct.pack("<Q", len(header) + length)
        header[-8:] = struct.pack("<Q", 24 + length)
    elif kind == "caf":
        header[-8:] = struct.pack(">q", length)
    else:
        header[4:8] = struct.pack(">I", min(len(header) - 8 + length, 0xFFFFFFFE))
        header[-4:] = struct.pack(">I", min(length, 0xFFFFFFFE))
        for chunk in before:
            if chunk.name == b"COMM":
                channels, _, bits = struct.unpack(">hIh", source.read(chunk.at, 8))
                compression = source.read(chunk.at + 18, 4) if source.read(begin + 8, 4) == b"AIFC" else b"NONE"
                width = _PCM_AIFC.get(compression, None)
                if width is not None and channels > 0:
                    frames = (length - 8) // (channels * (width or (bits + 7) // 8 or 1))
                    header[chunk.at - begin + 2 : chunk.at - begin + 6] = struct.pack(">I", min(frames, 0xFFFFFFFF))
    return (bytes(header), *slices)


def _wave_header(source: ByteSource, dialect: Dialect, before: list[Chunk], length: int) -> bytes:
    """Returns a RIFF or, beyond 4 GiB, RF64 header (EBU Tech 3306) with the file's own fmt chunk."""
    fmt = b""
    for chunk in before:
        if chunk.name == b"fmt ":
            content = source.read(chunk.at, min(chunk.size, 4_096))
            fmt = b"fmt " + len(content).to_bytes(4, dialect.order) + content + bytes(len(content) % 2)
    if len(fmt) + length < 0xFFFF0000:
        name, size = (b"RIFX" if dialect is RIFX else b"RIFF"), 4 + len(fmt) + 8 + length
        return name + size.to_bytes(4, dialect.order) + b"WAVE" + fmt + b"data" + length.to_bytes(4, dialect.order)
    ds64 = struct.pack("<4sIQQQI", b"ds64", 28, 4 + 36 + len(fmt) + 8 + length, length, 0, 0)
    return b"RF64" + b"\xff" * 4 + b"WAVE" + ds64 + fmt + b"data" + b"\xff" * 4


def au_parts(source: ByteSource, begin: int, end: int) -> tuple[list[Part], int]:
    """Returns the part of an AU file, and where it ends. Raises AudioError (`truncated`)."""
    head = source.read(begin, 24)
    offset, size = struct.unpack(">II", head[4:12].ljust(8, b"\0"))
    start = begin + offset
    if is_placeholder(size):
        end = next_file(source, start, end)
        pieces: tuple[Piece, ...] = _whole(source, begin, end)
        if start < end:
            header = source.read(begin, min(offset, LARGEST_HEADER))
            pieces = (header[:8] + struct.pack(">I", min(end - start, 0xFFFFFFFF)) + header[12:], (start, end))
        return [Part(pieces)], end
    if start + size > end:
        raise AudioError("truncated", f"its header states {start + size - end:,} bytes more than the file has")
    return [Part(_whole(source, begin, start + size))], start + size


def nist_parts(source: ByteSource, begin: int, end: int) -> tuple[list[Part], int]:
    """Returns the part of a NIST SPHERE file, and where it ends. Raises AudioError (`truncated`)."""
    size = source.read(begin + 8, 8).strip()
    length = int(size) if size.isdigit() and int(size) < 1 << 20 else 1_024
    header = source.read(begin, length)
    fields: dict[bytes, bytes] = {}
    for line in header.split(b"\n")[2:]:
        name, _, value = line.partition(b" ")
        if name == b"end_head":
            break
        fields[name] = value.split(b" ", 1)[-1].strip()
    counts = [fields.get(name, b"") for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    count, channels, width = (int(value) if value.isdigit() else 0 for value in counts)
    if b"embedded" in fields.get(b"sample_coding", b"") or not channels * width:
        end = next_file(source, begin + length, end)
        return [Part(_whole(source, begin, end))], end
    promised = begin + length + count * channels * width
    if is_placeholder(count) or is_placeholder(count * channels * width):
        end = next_file(source, begin + length, end)
        frames = (end - begin - length) // (channels * width)
        lines = [line for line in header.split(b"end_head")[0].split(b"\n") if not line.startswith(b"sample_count")]
        changed = b"\n".join([*lines[:-1], b"sample_count -i %d" % frames, b"end_head\n"])
        return [Part((changed.ljust(length, b"\n"), (begin + length, end)))], end
    if promised > end:
        raise AudioError("truncated", f"its header states {promised - end:,} bytes more than the file has")
    return [Part(_whole(source, begin, promised))], promised


def avi_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns the end of an AVI file: of its RIFF chunk and of the AVIX chunks that continue it.

    Raises:
        AudioError: `truncated` if the first one states more bytes than the file has.
    """
    at = begin
    while source.read(at, 4) == b"RIFF" and (at == begin or source.read(at + 8, 4) == b"AVIX"):
        size = _number(source, at + 4, 4, "little")
        if is_placeholder(size):
            return next_file(source, at + 12, end)
        if at == begin and at + 8 + size > end + 1:
            raise AudioError("truncated", f"its header states {at + 8 + size - end:,} bytes more than the file has")
        at += 8 + size + size % 2
    return min(at, end)
