"""Random access to the bytes of a local file or a buffer, and files composed of byte ranges of it."""

from __future__ import annotations

import bisect
import io
import itertools
import os
import stat
from types import TracebackType
from typing import Final

from data_pipeline.audio.errors import AudioError

Piece = bytes | tuple[int, int]
"""Literal bytes, or the byte range (begin, end) of a source."""
CHUNK: Final = 1 << 20


class ByteSource:
    """Random access to a regular local file or to bytes in memory.

    Raises:
        AudioError: `empty` for a file without bytes, `no_file` for pipes, devices and folders.
    """

    def __init__(self, origin: str | bytes) -> None:
        self.path = origin if isinstance(origin, str) else ""
        self._data = origin if isinstance(origin, bytes) else b""
        self._handle = -1
        if not isinstance(origin, bytes):
            self._handle = os.open(origin, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
            status = os.fstat(self._handle)
            self.size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                self.close()
                raise AudioError("no_file", "is not a regular file")
        else:
            self.size = len(origin)
        if not self.size:
            self.close()
            raise AudioError("empty", "is an empty file")

    def read(self, at: int, size: int) -> bytes:
        """Returns `size` bytes from position `at`; fewer at the end of the file."""
        return os.pread(self._handle, size, at) if self._handle >= 0 else self._data[at : at + size]

    def find(self, needle: bytes, begin: int, end: int) -> int:
        """Returns the position of the first `needle` that begins in [begin, end); -1 if there is none."""
        for at in range(begin, end, CHUNK):
            found = self.read(at, min(CHUNK, end - at) + len(needle) - 1).find(needle)
            if found >= 0:
                return at + found
        return -1

    def descriptor(self) -> int:
        """Returns a duplicate descriptor at the start of the file; the reader closes it, and shares its position."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        return os.dup(self._handle)

    def position(self) -> int:
        """Returns the position up to which the last `descriptor` was read; the size for bytes in memory."""
        return os.lseek(self._handle, 0, os.SEEK_CUR) if self._handle >= 0 else self.size

    def close(self) -> None:
        """Closes the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> ByteSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class PieceFile(io.RawIOBase):
    """A readable file that concatenates pieces of a source.

    Args:
        source: the source of byte ranges.
        pieces: literal bytes and byte ranges.
        claim: factor by which the reported size exceeds the true one. libmpg123 estimates the length of an MP3 file
            without a header frame from the file's size and the first frame's bit rate and stops there; a larger size
            makes it read to the true end.
    """

    def __init__(self, source: ByteSource, pieces: tuple[Piece, ...], claim: int = 1) -> None:
        super().__init__()
        self._source, self._pieces = source, pieces
        lengths = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self._starts = [0, *itertools.accumulate(lengths)]
        self._claimed = self._starts[-1] * claim
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._claimed}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        got = 0
        while got < len(buffer) and self._at < self._starts[-1]:
            number = bisect.bisect_right(self._starts, self._at) - 1
            piece, inside = self._pieces[number], self._at - self._starts[number]
            wanted = min(len(buffer) - got, self._starts[number + 1] - self._at)
            if isinstance(piece, bytes):
                found = piece[inside : inside + wanted]
            else:
                found = self._source.read(piece[0] + inside, wanted)
            if not found:
                break
            buffer[got : got + len(found)] = found
            got += len(found)
            self._at += len(found)
        return got
