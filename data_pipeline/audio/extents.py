"""Finds where a file ends that others may follow, by the sizes that its frames, blocks or packets state.

Decoders stop at the end of the first file or run across it; neither gives the position of the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from data_pipeline.audio import mpeg
from data_pipeline.audio.byte_source import ByteSource

Sizes = Callable[[ByteSource, int], int]
"""Returns the size in bytes of the frame, block or packet at a position; 0 if there is none."""
GSM_BYTES: Final = 33
"""One frame of GSM 06.10 full rate: 160 samples at 8 kHz."""
TS_BYTES: Final = 188
_AMR: Final = {
    False: (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1),
    True: (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1),
}
"""Bytes of an AMR frame with its header, by frame type (RFC 4867); True: wide band."""
_AC3_KBPS: Final = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
_WAVPACK_INITIAL: Final = 0x800
_MATROSKA: Final = {
    *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B, 0x1043A770, 0x1254C367, 0x1941A469),
    *(0xEC, 0xBF, 0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854),
}
"""Names of the elements within a segment and within a cluster (RFC 9559)."""


def file_end(source: ByteSource, begin: int, end: int, kind: str) -> int:
    """Returns where the file of format `kind` at byte `begin` ends; `end` if its structure does not give that."""
    if kind == "adts":
        return walk(source, begin, end, _tagged_adts_size, cut=True)
    if kind in SIZES:
        return walk(source, begin, end, SIZES[kind], cut=True)
    if kind == "amr":
        return _amr_end(source, begin, end)
    if kind == "flv":
        return walk(source, begin + int.from_bytes(source.read(begin + 5, 4), "big") + 4, end, _flv_size)
    known = {"voc": _voc_end, "tta": _tta_end, "ape": _ape_end, "wavpack": _wavpack_end, "asf": _asf_end}
    return min(known[kind](source, begin, end), end) if kind in known else end


def walk(source: ByteSource, at: int, end: int, size_at: Sizes, cut: bool = False) -> int:
    """Returns where frames that follow each other end.

    Args:
        source: the file.
        at: position of the first frame.
        end: position at which the search ends.
        size_at: returns the size in bytes of the frame at a position, 0 where there is none.
        cut: whether a frame that the file's end cuts counts as well.
    """
    while at < end and (size := size_at(source, at)):
        if size > end - at:
            return end if cut else at
        at += size
    return min(at, end)


def adts_size(source: ByteSource, at: int) -> int:
    """Returns the size of an ADTS frame (ISO 13818-7)."""
    head = source.read(at, 7)
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size >= 7 else 0


def _tagged_adts_size(source: ByteSource, at: int) -> int:
    """Returns the size of an ADTS frame or of the ID3 tag before a segment of an HTTP live stream."""
    if source.read(at, 3) == b"ID3":
        return mpeg.after_tags(source, at, source.size) - at
    return adts_size(source, at)


def ac3_size(source: ByteSource, at: int) -> int:
    """Returns the size of a frame of AC-3 or Enhanced AC-3 (ATSC A/52, table 5.18 and annex E)."""
    head = source.read(at, 6)
    if len(head) < 6 or head[:2] != b"\x0bw":
        return 0
    if head[5] >> 3 > 10:
        return 2 * ((head[2] & 7) << 8 | head[3]) + 2
    rate, code = head[4] >> 6, head[4] & 63
    if rate == 3 or code > 37:
        return 0
    kbps = _AC3_KBPS[code >> 1]
    return (4 * kbps, 2 * (kbps * 320 // 147 + (code & 1)), 6 * kbps)[rate]


def _ts_size(source: ByteSource, at: int) -> int:
    """Returns the size of MPEG-TS packets (ISO 13818-1), of many at once."""
    sync = np.frombuffer(source.read(at, TS_BYTES * 4_096), np.uint8)[::TS_BYTES] != 0x47
    whole = min(len(sync), (source.size - at) // TS_BYTES)
    return TS_BYTES * (int(sync[:whole].argmax()) if sync[:whole].any() else whole)


def _ps_size(source: ByteSource, at: int) -> int:
    """Returns the size of a pack header or packet of an MPEG program stream (ISO 13818-1, ISO 11172-1)."""
    head = source.read(at, 14)
    if head[:3] != b"\0\0\1" or len(head) < 4:
        return 0
    if head[3] == 0xBA:
        return 14 + (head[13] & 7) if len(head) == 14 and head[4] >> 6 == 1 else 12
    return 4 if head[3] == 0xB9 else 6 + int.from_bytes(head[4:6], "big") if head[3] >= 0xBB else 0


def _flv_size(source: ByteSource, at: int) -> int:
    head = source.read(at, 4)
    return 15 + int.from_bytes(head[1:4], "big") if head[0] in (8, 9, 18) else 0


SIZES: Final[dict[str, Sizes]] = {
    "adts": adts_size,
    "ac3": ac3_size,
    "gsm": lambda source, at: GSM_BYTES * (source.read(at, 1)[0] >> 4 == 13),
    "mpeg-ts": _ts_size,
    "mpeg-ps": _ps_size,
}


def _amr_end(source: ByteSource, begin: int, end: int) -> int:
    magic = source.read(begin, 15).split(b"\n")[0] + b"\n"
    sizes = _AMR[b"WB" in magic]

    def size_at(source: ByteSource, at: int) -> int:
        head = source.read(at, 1)
        return 0 if head[0] & 0x83 or not head[0] else sizes[head[0] >> 3 & 15]

    return walk(source, begin + len(magic), end, size_at, cut=True)


def _voc_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns the end of a Creative Voice File: behind the terminator, or where no block follows."""
    at = begin + int.from_bytes(source.read(begin + 20, 2), "little")
    while at < end:
        head = source.read(at, 4)
        if head[0] == 0:
            return at + 1
        if head[0] > 9:
            return at
        at += 4 + int.from_bytes(head[1:], "little")
    return end


def _tta_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns the end of a True Audio file, from the frame sizes in its seek table."""
    head = source.read(begin, 22)
    rate, samples = (int.from_bytes(head[at : at + 4], "little") for at in (10, 14))
    length = 256 * rate // 245
    if not length or not samples:
        return end
    table = source.read(begin + 22, 4 * -(-samples // length))
    return begin + 22 + len(table) + 4 + int(np.frombuffer(table[: len(table) // 4 * 4], "<u4").sum(dtype=np.int64))


def _ape_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns the end of a Monkey's Audio file from version 3.98 on, whose descriptor has the sizes of all sections."""
    head = source.read(begin, 36)
    if len(head) < 36 or int.from_bytes(head[4:6], "little") < 3_980:
        return end
    sizes = np.frombuffer(head[8:36], "<u4").astype(object)
    return begin + int(sizes.sum() - sizes[5] + (sizes[5] << 32))


def _wavpack_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns where blocks end or begin again with an earlier sample, as at the start of another file."""
    last = -1

    def size_at(source: ByteSource, at: int) -> int:
        nonlocal last
        head = source.read(at, 32)
        if len(head) < 32 or head[:4] != b"wvpk":
            return 0
        index, count, flags = (int.from_bytes(head[at : at + 4], "little") for at in (16, 20, 24))
        if count and flags & _WAVPACK_INITIAL:
            if index <= last:
                return 0
            last = index
        return 8 + int.from_bytes(head[4:8], "little")

    return walk(source, begin, end, size_at, cut=True)


def _asf_end(source: ByteSource, begin: int, end: int) -> int:
    """Returns where the objects of an ASF file end; the header object of another file ends them, too."""
    header = source.read(begin, 16)

    def size_at(source: ByteSource, at: int) -> int:
        head = source.read(at, 24)
        size = int.from_bytes(head[16:], "little")
        return 0 if size < 24 or (at > begin and head[:16] == header) else size

    return walk(source, begin, end, size_at)


def cluster_end(source: ByteSource, at: int, end: int) -> int:
    """Returns where the elements of a Matroska segment of unknown size end.

    Args:
        source: the file.
        at: position of the segment's first element.
        end: end of the file.
    """

    def size_at(source: ByteSource, at: int) -> int:
        raw = source.read(at, 4)
        width = 9 - raw[0].bit_length() if raw and raw[0] else 8
        if int.from_bytes(raw[:width], "big") not in _MATROSKA:
            return 0
        size, content = ebml_size(source, at + width)
        return content - at + (size or 0)  # an element of unknown size: its content follows

    return walk(source, at, end, size_at)


def ebml_size(source: ByteSource, at: int) -> tuple[int | None, int]:
    """Returns a variable-length size, None if it is unknown, and the position after it."""
    raw = source.read(at, 8)
    width = 9 - raw[0].bit_length() if raw and raw[0] else 8
    value = int.from_bytes(raw[:width], "big") & (1 << 7 * width) - 1
    return (None if value == (1 << 7 * width) - 1 else value), at + width
