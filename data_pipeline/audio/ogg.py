"""Ogg (RFC 3533): pages, and the chained logical streams of a file."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from data_pipeline.audio.byte_source import ByteSource, Piece
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.parts import Part

CHUNK: Final = 1 << 20
MAX_PAGE: Final = 27 + 255 + 255 * 255
CONTINUED, FIRST, LAST = 1, 2, 4
OPUS_RATE: Final = 48_000
LIVE_SECONDS: Final = 20
"""A stream whose first granule position is beyond this was recorded from the middle of a live stream; its positions do
not give its length."""
_BIT_REVERSED: Final = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


@dataclass
class _Link:
    """One chain link: the logical streams between one group of first pages and the next."""

    begin: int
    end: int = 0
    heads: dict[int, bytes] = field(default_factory=dict)
    """First packet of each logical stream, by serial number."""
    sequence: dict[int, int] = field(default_factory=dict)
    first_granule: int = -1
    last_granule: int = -1
    pages: int = 0

    @property
    def audio(self) -> int | None:
        """Serial number of the first audio stream."""
        known = (b"OpusHead", b"\x01vorbis", b"\x7fFLAC", b"Speex   ")
        return next((serial for serial, head in self.heads.items() if head.startswith(known)), None)


def checksum(page: bytes) -> int:
    """Returns the CRC-32 of a page whose checksum field is zero (RFC 3533, section 6)."""
    # zlib's CRC with the bits of each byte and of the result reversed, and without inversions
    crc = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def with_checksum(page: bytes) -> bytes:
    """Returns a page with its checksum field set."""
    blank = page[:22] + bytes(4) + page[26:]
    return blank[:22] + struct.pack("<I", checksum(blank)) + blank[26:]


def with_serial(ogg: bytes, serial: int) -> bytes:
    """Returns an Ogg stream with another serial number on each page."""
    pages, at = [], 0
    while at < len(ogg):
        segments = ogg[at + 26]
        end = at + 27 + segments + sum(ogg[at + 27 : at + 27 + segments])
        pages.append(with_checksum(ogg[at : at + 14] + struct.pack("<I", serial) + ogg[at + 18 : end]))
        at = end
    return b"".join(pages)


def ogg_parts(source: ByteSource, begin: int, end: int) -> tuple[list[Part], int]:
    """Returns a part for each chain link of an Ogg file, and where its last page ends.

    Args:
        source: the file.
        begin: position of the first page.
        end: end of the file.

    Raises:
        AudioError: `truncated` where the last page is cut, `corrupt` where a page in the middle is damaged or missing.
    """
    links = _links(source, begin, end)
    parts = [_part(source, link, whole=len(links) == 1 and link.begin == 0) for link in links]
    return [part for part in parts if part is not None], links[-1].end if links else begin


def _links(source: ByteSource, begin: int, end: int) -> list[_Link]:
    links: list[_Link] = []
    at, window_at, window, grouped = begin, begin, b"", False
    while at + 27 <= end:
        if at + MAX_PAGE > window_at + len(window) and window_at + len(window) < end:
            window_at, window = at, source.read(at, min(CHUNK, end - at))
        inside = at - window_at
        if window[inside : inside + 4] != b"OggS":
            found = source.find(b"OggS\0", at, end)
            if found >= 0:
                raise AudioError("corrupt", f"{found - at:,} bytes in the middle, at byte {at:,}, are not Ogg pages")
            break
        flags, granule, serial, sequence = struct.unpack_from("<BqII", window, inside + 5)
        lacing = window[inside + 27 : inside + 27 + window[inside + 26]]
        size = 27 + len(lacing) + sum(lacing)
        if at + size > end:
            raise AudioError("truncated", f"its last page lacks {at + size - end:,} bytes")
        page = window[inside : inside + size]
        if checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise AudioError("corrupt", f"checksum mismatch in the Ogg page at byte {at:,}")
        if flags & FIRST and not grouped:
            links.append(_Link(at))
        if links:
            _note(
                links[-1],
                flags,
                granule=granule,
                serial=serial,
                sequence=sequence,
                body=page[27 + len(lacing) :],
                at=at,
            )
            links[-1].end = at + size
        grouped = bool(flags & FIRST)
        at += size
    return links


def _note(link: _Link, flags: int, granule: int, serial: int, sequence: int, body: bytes, at: int) -> None:
    if flags & FIRST:
        link.heads[serial] = body[:80]
    elif serial in link.sequence and sequence != link.sequence[serial] + 1 and link.last_granule > 0:
        # a gap right after the headers is normal for a recording of a live stream
        raise AudioError("corrupt", f"pages are missing before byte {at:,}")
    link.sequence[serial] = sequence
    if serial == link.audio and granule > 0:
        link.first_granule = granule if link.first_granule < 0 else link.first_granule
        link.last_granule = granule
    link.pages += 1


def _part(source: ByteSource, link: _Link, whole: bool) -> Part | None:
    """Returns the part of a chain link; None for a link without audio."""
    serial = link.audio
    if serial is None:
        return Part(((link.begin, link.end),)) if whole else None
    head, pieces = link.heads[serial], () if whole else ((link.begin, link.end),)
    if not head.startswith(b"OpusHead"):
        rate = int.from_bytes(head[12:16], "little") if head.startswith(b"\x01vorbis") else 0
        joined = not rate or link.first_granule > LIVE_SECONDS * rate
        # Vorbis blocks overlap: up to one long block may be missing at either end
        return Part(pieces, None if joined else max(link.last_granule, 0), 8_192)
    skipped = int.from_bytes(head[10:12], "little")
    joined = link.first_granule > LIVE_SECONDS * OPUS_RATE
    frames = None if joined else max(link.last_granule - skipped, 0)
    return Part(_at_48_khz(source, link, serial), frames, 5_760)


def _at_48_khz(source: ByteSource, link: _Link, serial: int) -> tuple[Piece, ...]:
    """Returns the pieces of a link with the rate in its OpusHead set to 48 kHz.

    The field is the rate of the encoder's input, not the playback rate (RFC 7845, section 5.1), but libsndfile decodes
    at it.
    """
    at = link.begin
    while True:
        head = source.read(at, 27 + 255)
        size = 27 + head[26] + sum(head[27 : 27 + head[26]])
        if int.from_bytes(head[14:18], "little") == serial:
            break
        at += size
    page, body = source.read(at, size), 27 + head[26]
    changed = with_checksum(page[: body + 12] + struct.pack("<I", OPUS_RATE) + page[body + 16 :])
    before: tuple[Piece, ...] = ((link.begin, at),) if at > link.begin else ()
    return (*before, changed, (at + size, link.end))
