"""FLAC (RFC 9639): lengths from STREAMINFO and from the last frame, and concatenated files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from data_pipeline.audio.byte_source import CHUNK, ByteSource, Piece
from data_pipeline.audio.parts import Part

MARK: Final = b"fLaC"
STREAMINFO: Final = (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22")
"""Header of the first metadata block."""
LAST_BYTES: Final = 1 << 16
"""Bytes at the end that are searched for the last frames; 4,608 samples of 24-bit stereo take at most 27 KB."""
READ_AHEAD: Final = 1 << 16
"""Upper bound of the bytes that a decoder reads beyond the last frame."""
LARGEST_FRAME: Final = 1 << 19
"""Bytes behind the start of the last frame in which its end is searched."""
_BLOCK_SIZES: Final = {1: 192, **{n: 144 << n for n in range(2, 6)}, **{n: 1 << n for n in range(8, 16)}}


def flac_parts(
    source: ByteSource, begin: int, end: int, mark: int, begins: Callable[[int], str]
) -> tuple[list[Part], int]:
    """Returns a part for each FLAC stream of a file, and where a file of another format follows; `end` if none does.

    A large local file is not searched: its only part has `may_continue` set, and `later_parts` finds the streams after
    the position at which its decoder stops.

    Args:
        source: the file.
        begin, end: positions between which its audio can be.
        mark: position of the first "fLaC".
        begins: returns the format of the data at a position, behind tags; empty where none is known.
    """
    searched = not source.path or begin > 0 or end - begin <= 4 * LAST_BYTES
    starts = [mark, *_marks(source, mark + 42 if searched else max(mark + 42, end - LAST_BYTES), end)]
    if len(starts) > 1 and not searched:
        starts = [mark, *_marks(source, mark + 42, end)]
    alone = len(starts) == 1 and begin == 0
    parts: list[Part] = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        if (other := _other_file(source, start, stop, begins)) < stop:
            return [*parts, _part(source, start, other, False)], other
        parts.append(_part(source, start, stop, alone))
    return [dataclasses.replace(parts[0], may_continue=True)] if alone and not searched else parts, end


def later_parts(source: ByteSource) -> list[Part]:
    """Returns the parts after the one that a decoder has just read from the file."""
    if (position := source.position()) >= source.size:
        return []
    return parts_behind(source, max(position - READ_AHEAD, 42))


def parts_behind(source: ByteSource, at: int) -> list[Part]:
    """Returns the parts that begin at or behind a position, which is searched for them."""
    starts = _marks(source, at, source.size)
    return [_part(source, start, stop, False) for start, stop in zip(starts, [*starts[1:], source.size], strict=False)]


def _marks(source: ByteSource, at: int, end: int) -> list[int]:
    """Returns the positions at which further streams begin."""
    starts = []
    while (found := source.find(MARK, at, end)) >= 0:
        head = source.read(found, 42)
        if head[4:8] in STREAMINFO and _plausible(head):
            starts.append(found)
        at = found + 4
    return starts


def _plausible(head: bytes) -> bool:
    smallest, largest = int.from_bytes(head[8:10], "big"), int.from_bytes(head[10:12], "big")
    return len(head) == 42 and 16 <= smallest <= largest and bool(int.from_bytes(head[18:21], "big") >> 4)


def _part(source: ByteSource, start: int, stop: int, whole: bool) -> Part:
    head = source.read(start, 42)
    fields = int.from_bytes(head[18:26], "big")
    total, md5 = fields & (1 << 36) - 1, head[26:42]
    pieces: tuple[Piece, ...] = () if whole else ((start, stop),)
    last, _ = _last_sample(source, start, stop, int.from_bytes(head[8:10], "big"))
    if total and last > total:
        # the header's count is too low: without it the decoder goes on to the end
        unknown = (fields >> 36 << 36).to_bytes(8, "big")
        return Part((head[:18] + unknown + head[26:], (start + 42, stop)), last, md5=md5, read_to_end=True)
    return Part(pieces, total or None, md5=md5 if any(md5) else b"", read_to_end=not total)


def _last_sample(source: ByteSource, start: int, stop: int, block: int) -> tuple[int, int]:
    """Returns the end of the last frame in samples and its position; (0, -1) unless two frame headers agree on it."""
    begin = max(start + 42, stop - LAST_BYTES)
    tail = source.read(begin, stop - begin)
    ends: dict[int, tuple[int, int]] = {}
    at = len(tail)
    while len(ends) < 8 and (at := tail.rfind(b"\xff", 0, at)) >= 0:
        if tail[at + 1 : at + 2] in (b"\xf8", b"\xf9") and (found := _frame(tail[at : at + 16], block)):
            if found[1] in ends:
                return ends[found[1]]
            ends.setdefault(found[0], (found[1], begin + at))
    return 0, -1


def _other_file(source: ByteSource, start: int, stop: int, begins: Callable[[int], str]) -> int:
    """Returns where another file follows the stream at `start`; `stop` if none does.

    The last frame is that of STREAMINFO or, where that is not near `stop`, the last of those whose numbers follow each
    other; its CRC-16 gives its end.
    """
    head = source.read(start, 42)
    block, total = int.from_bytes(head[8:10], "big"), int.from_bytes(head[18:26], "big") & (1 << 36) - 1
    last, frame = _last_sample(source, start, stop, block)
    if (not total or last != total) and (frame := _last_frame(source, start, stop, block)) < 0:
        return stop
    data, crc = source.read(frame, min(stop - frame, LARGEST_FRAME)), 0
    for size, byte in enumerate(data, start=1):
        crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
        if not crc and begins(frame + size):
            return frame + size
    return stop


def _last_frame(source: ByteSource, start: int, stop: int, block: int) -> int:
    """Returns the position of the last frame of those whose numbers follow each other; -1 without one."""
    begin, last_block = start + 4, False
    while not last_block and begin < stop:
        head = source.read(begin, 4).ljust(4, b"\0")
        last_block, begin = head[0] >= 0x80, begin + 4 + int.from_bytes(head[1:], "big")
    sync, found, expected = source.read(begin, 2), -1, 0
    if sync not in (b"\xff\xf8", b"\xff\xf9"):
        return -1
    for at in range(begin, stop, CHUNK):
        data = source.read(at, min(CHUNK + 16, stop - at))
        inside = data.find(sync, 0, CHUNK + 1)
        while inside >= 0:
            if (frame := _frame(data[inside : inside + 16], block)) and frame[0] == expected:
                found, expected = at + inside, frame[1]
            inside = data.find(sync, inside + 1, CHUNK + 1)
    return found


def _frame(head: bytes, block: int) -> tuple[int, int] | None:
    """Returns first and last sample (exclusive) of the frame whose header begins `head`; None if it is not a header."""
    if len(head) < 6 or head[3] & 1:
        return None
    size_code, rate_code, lead = head[2] >> 4, head[2] & 15, head[4]
    extra = 0 if lead < 0x80 else next((n for n in range(1, 7) if lead >> (6 - n) & 1 == 0), 7)
    if size_code == 0 or rate_code == 15 or extra == 7 or 0x80 <= lead < 0xC0:
        return None
    number = lead if not extra else lead & (1 << (6 - extra)) - 1
    for byte in head[5 : 5 + extra]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 63
    at = 5 + extra
    if size_code in (6, 7):
        size, at = int.from_bytes(head[at : at + size_code - 5], "big") + 1, at + size_code - 5
    else:
        size = _BLOCK_SIZES[size_code]
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    first = number if head[1] & 1 else number * block
    return first, first + size


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 if crc & 0x80 else crc << 1) & 0xFF
    return crc


def _crc16_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8005 if crc & 0x8000 else crc << 1) & 0xFFFF
        table.append(crc)
    return table


_CRC16: Final = _crc16_table()
