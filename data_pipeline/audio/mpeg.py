"""MPEG audio (MP3, MP2, MP1): scans all frames, the only reliable way to determine the length of a file.

Each frame has a header of 4 bytes (ISO 11172-3, 2.4.2.3) from which its size follows. A file may begin with a Xing/Info
frame that counts the frames; without one, an estimate from the file size holds for constant bit rate only. A file may
also be several files joined together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.parts import Part

CHUNK: Final = 1 << 20
LARGEST: Final = 2_881
"""Bytes of the largest frame: MPEG-1 layer II at 384 kb/s and 32 kHz, plus padding."""
RESYNC: Final = 1_000
"""Bytes between frames beyond which libmpg123 gives up."""
CLAIM: Final = 64
"""More than the ratio of the largest bit rate (448 kb/s) to the smallest (8 kb/s)."""
_RATES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_KBPS: Final = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _table() -> tuple[list[int], list[int]]:
    """Returns frame sizes in bytes and kinds (version, layer, rate) by a header's second and third byte; 0: invalid."""
    sizes, kinds = [0] * 65_536, [0] * 65_536
    for word in range(0xE000, 0x10000):
        version, layer = word >> 11 & 3, word >> 9 & 3
        index, rate_index, padding = word >> 4 & 15, word >> 2 & 3, word >> 1 & 1
        if version == 1 or layer == 0 or index in (0, 15) or rate_index == 3:
            continue
        rate, kbps = _RATES[version][rate_index], _KBPS[version == 3, layer][index - 1]
        if layer == 3:
            sizes[word] = (12_000 * kbps // rate + padding) * 4
        else:
            sizes[word] = (72_000 if layer == 1 and version != 3 else 144_000) * kbps // rate + padding
        kinds[word] = word & 0x1E0C | 1 << 16 | version << 11
    return sizes, kinds


_SIZES, _KINDS = _table()


@dataclass
class _Stream:
    """Consecutive frames of one kind, from byte `begin` to `end`."""

    begin: int
    end: int
    kind: int
    word: int
    """Second and third byte of its first frame's header."""
    counted: int | None
    """Number of frames stated in its Xing/Info frame, if any."""
    silence: float
    """Seconds of audio missing before it."""
    frames: int = 0
    sizes: set[int] = field(default_factory=set)
    """Sizes of its frames in bytes."""

    @property
    def rate(self) -> int:
        """Samples per second."""
        return _RATES[self.word >> 11 & 3][self.word >> 2 & 3]

    @property
    def samples(self) -> int:
        """Samples per channel in one frame."""
        version, layer = self.word >> 11 & 3, self.word >> 9 & 3
        return 384 if layer == 3 else 576 if layer == 1 and version != 3 else 1_152


def is_mpeg_audio(source: ByteSource, begin: int, end: int) -> bool:
    """Returns whether three frames of one kind follow each other at `begin`, or fewer up to the file's end."""
    at, kind = begin, 0
    for _ in range(3):
        head = source.read(at, 4)
        word = int.from_bytes(head[1:3], "big")
        if len(head) < 4 or head[0] != 0xFF or not _SIZES[word] or kind not in (0, _KINDS[word]):
            return False
        kind = _KINDS[word]
        at += _SIZES[word]
        if at >= end:
            return True
    return True


def after_tags(source: ByteSource, begin: int, end: int) -> int:
    """Returns the position behind ID3v2, ID3v1, APE and Lyrics3 tags and zero bytes at `begin`."""
    return _after_tags(source, begin, end)[0]


def _after_tags(source: ByteSource, begin: int, end: int) -> tuple[int, int]:
    """Returns the position behind tags and zero bytes, and how many zeros outside of tags are directly before it."""
    zeros = 0
    while begin < end:
        if (behind := _after_tag(source, begin, end)) > begin:
            begin, zeros = behind, 0
            continue
        data = source.read(begin, 1)
        if data == b"\0":
            data = source.read(begin, CHUNK)
        found = len(data) - len(data.lstrip(b"\0"))
        if not found:
            break
        begin, zeros = begin + found, zeros + found
        if source.read(begin + 1, 4) == b"ftyp" or source.read(begin, 2) == b"\x01\xba":  # MP4, MPEG program stream
            return begin - min(zeros, 3 if source.read(begin + 1, 4) == b"ftyp" else 2), 0
    return min(begin, end), zeros


def _after_tag(source: ByteSource, begin: int, end: int) -> int:
    head = source.read(begin, 32)
    if head[:3] == b"ID3" and len(head) > 9:
        sizes = head[6:10]
        return begin + 10 + (sizes[0] << 21 | sizes[1] << 14 | sizes[2] << 7 | sizes[3]) + 10 * (head[5] >> 4 & 1)
    if head[:3] == b"TAG":
        return begin + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return begin + 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0)
    if head[:11] == b"LYRICSBEGIN":
        found = source.find(b"LYRICS200", begin, min(begin + 100_000, end))
        return found + 9 if found >= 0 else begin + 11
    return begin


def _borrowed(frame: bytes) -> int:
    """Returns by how many bytes the audio of a layer III frame begins before it (ISO 11172-3, main_data_begin)."""
    word = frame[1] << 8 | frame[2]
    if word >> 9 & 3 != 1 or len(frame) < 8:
        return 0
    side = frame[4 if word >> 8 & 1 else 6 :]
    return side[0] << 1 | side[1] >> 7 if word >> 11 & 3 == 3 else side[0]


def mpeg_parts(source: ByteSource, begin: int, end: int, begins: Callable[[int], str]) -> tuple[list[Part], int]:
    """Returns the parts of an MPEG audio file, and where a file of another format follows; `end` if none does.

    There is one part for each joined file and for each change of rate or channels. `begins` returns the format of the
    data at a position.

    Raises:
        AudioError: `truncated` if there are fewer frames than a Xing/Info frame states, `corrupt` if bytes in the
            middle are not audio and the length of the audio that they replace is not known.
    """
    first, zeros = _after_tags(source, begin, end)
    if zeros and _borrowed(source.read(first, 8)):
        raise AudioError("corrupt", f"its audio before byte {first:,} was overwritten by {zeros:,} zeros")
    if samples := _counted_and_sized(source, begin, end, begins):
        return [Part(tolerance=samples)], end
    found = list(_streams(source, begin, end, begins))
    stop = found[-1].end if found and _is_other(source, found[-1].end, end, begins) else end
    streams = [stream for stream in found if stream.frames]
    if len(streams) > 1 and streams[-1].frames <= 2 and streams[-1].counted is None:
        streams.pop()  # the count is one too low; no second file was joined
    for stream in streams:
        if stream.counted is not None and stream.frames < stream.counted - 1:
            raise AudioError(
                "truncated", f"contains {stream.frames:,} of the {stream.counted:,} frames stated in its header"
            )
    if len(streams) == 1 and begin == 0 and stop == end and (only := streams[0]):
        if only.counted is not None:
            return [Part(tolerance=only.samples)], end
        return [Part(frames=only.frames * only.samples, tolerance=3 * only.samples, read_to_end=True)], end
    parts = []
    for stream in streams:
        if stream.counted is None:
            frames, tolerance = stream.frames * stream.samples, 3 * stream.samples
            part = Part(((stream.begin, stream.end),), frames, tolerance, read_to_end=True, silence=stream.silence)
        else:
            part = Part(((stream.begin, stream.end),), None, stream.samples, silence=stream.silence)
        parts.append(part)
    return parts, stop


def _is_other(source: ByteSource, at: int, end: int, begins: Callable[[int], str]) -> bool:
    """Returns whether a file of another format begins at `at`, or behind the tags there."""
    return (begins(at) or begins(after_tags(source, at, end))) not in ("", "mpeg")


def _counted_and_sized(source: ByteSource, begin: int, end: int, begins: Callable[[int], str]) -> int:
    """Returns the samples per frame of a file whose Xing/Info frame has the frame count and true size; else 0."""
    at = after_tags(source, begin, end)
    head = source.read(at, 200)
    side = _side_information(head[:4]) if begin == 0 and len(head) == 200 else 0
    if not side or head[4 + side : 8 + side] not in (b"Xing", b"Info") or head[11 + side] & 3 != 3:
        return 0
    count, size = (int.from_bytes(head[at : at + 4], "big") for at in (12 + side, 16 + side))
    stream = _Stream(at, at, 0, head[1] << 8 | head[2], count, 0.0)
    fits = count and abs(end - at - size) <= LARGEST + 128 and not _is_other(source, at + size, end, begins)
    return stream.samples if fits else 0


def _streams(source: ByteSource, begin: int, end: int, begins: Callable[[int], str]) -> Iterator[_Stream]:
    at = after_tags(source, begin, end)
    stream: _Stream | None = None
    silence = 0.0
    while at + 4 <= end:
        chunk = source.read(at, min(CHUNK, end - at))
        last = len(chunk) - (4 if at + len(chunk) >= end else 200)  # a frame's Xing/Info header must be in the chunk
        headers, inside = _header_frames(chunk), 0
        while inside <= last:
            word = chunk[inside + 1] << 8 | chunk[inside + 2]
            size = _SIZES[word] if chunk[inside] == 0xFF else 0
            if not size or at + inside + size > end:
                break
            kind = _KINDS[word] | (chunk[inside + 3] >= 0xC0) << 20
            if stream is None or kind != stream.kind or inside in headers or stream.frames == stream.counted:
                if stream is not None:
                    stream.end = max(stream.end, at + inside)
                    yield stream
                stream = _Stream(at + inside, at + inside, kind, word, headers.get(inside), silence)
                stream.frames -= inside in headers  # the header frame itself holds no audio
                silence = 0.0
            inside += size
            stream.frames += 1
            stream.sizes.add(size)
        at += inside
        if stream is not None:
            stream.end = max(stream.end, at)
        if inside <= last:
            if _is_other(source, at, end, begins):
                break
            resumed = _resume(source, at, end)
            if stream is not None and resumed < end:
                lost = _lost_frames(source, stream, at, resumed)
                if lost or resumed - at > RESYNC:
                    yield stream
                    silence, stream = lost * stream.samples / stream.rate, None
            at = resumed
    if stream is not None:
        yield stream


def _lost_frames(source: ByteSource, stream: _Stream, at: int, resumed: int) -> int:
    """Returns how many frames the bytes between `at`, where `stream` breaks off, and `resumed` replace.

    0 for tags, for a few zeros, and where another file begins. Raises AudioError (`corrupt`) if the number is not known
    to two frames, as in variable bit rate, or if the hole is larger than `LARGEST`.
    """
    hole, mean = resumed - at, (at - stream.begin) / max(stream.frames, 1)
    if any(source.read(at, min(hole, CHUNK))):
        if after_tags(source, at, end=resumed) == resumed:
            return 0
    elif hole < mean / 2 or 0 in _header_frames(source.read(resumed, 200)):
        return 0
    if hole > LARGEST or hole / min(stream.sizes) - hole / max(stream.sizes) > 2:
        raise AudioError("corrupt", f"{hole:,} bytes in the middle, at byte {at:,}, are not audio")
    return max(round(hole / mean), 1)


def _header_frames(chunk: bytes) -> dict[int, int | None]:
    """Returns the positions of Xing/Info frames in `chunk`, and the number of frames that each states."""
    found: dict[int, int | None] = {}
    for name in (b"Xing", b"Info"):
        at = chunk.find(name)
        while at >= 0:
            for side in (32, 17, 9):
                begin = at - 4 - side
                if begin >= 0 and side == _side_information(chunk[begin : begin + 4]):
                    flags, count = chunk[at + 7 : at + 8], int.from_bytes(chunk[at + 8 : at + 12], "big")
                    found[begin] = count if flags and flags[0] & 1 and count else None
            at = chunk.find(name, at + 4)
    return found


def _side_information(header: bytes) -> int:
    """Returns the bytes between a layer III frame's header and the name of a Xing/Info header; 0 for other data."""
    word = header[1] << 8 | header[2]
    if header[0] != 0xFF or not _SIZES[word] or word >> 9 & 3 != 1:
        return 0
    mono = header[3] >= 0xC0
    return (17 if mono else 32) if word >> 11 & 3 == 3 else (9 if mono else 17)


def _resume(source: ByteSource, at: int, end: int) -> int:
    """Returns the position at which frames continue after other data; `end` if they do not."""
    behind = after_tags(source, at, end)
    if behind > at and is_mpeg_audio(source, behind, end):
        return behind
    at = max(at + 1, behind)
    while (found := source.find(b"\xff", at, end)) >= 0:
        if is_mpeg_audio(source, found, end) and end - found > 3 * 24:
            return found
        at = found + 1
    return end
