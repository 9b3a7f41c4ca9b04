"""Reads and appends JSON-lines files: one JSON object per line; only a newline ends a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JsonLines:
    """The content of a JSON-lines file."""

    rows: list[dict[str, Any]]
    """The lines that are JSON objects, in order."""
    bad_lines: tuple[int, ...]
    """Numbers, from 1, of invalid lines: damaged, truncated by a crash, or not an object."""


@dataclass(frozen=True)
class Line:
    """A line that is not empty."""

    number: int
    """Line number from 1, including empty lines."""
    row: dict[str, Any] | None
    """None if the line is not a JSON object."""
    problem: str = ""
    """Reason why there is no row: "is not JSON (…)" or "is not a JSON object"."""


def each_line(lines: Iterable[bytes]) -> Iterator[Line]:
    """Parses lines one by one; empty lines are skipped."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
            yield Line(number, None, f"is not JSON ({error})")
            continue
        is_object = isinstance(row, dict)
        yield Line(number, row if is_object else None, "" if is_object else "is not a JSON object")


def parse(content: bytes) -> JsonLines:
    """Parses the bytes of a JSON-lines file; empty lines are ignored."""
    lines = list(each_line(content.split(b"\n")))
    rows = [line.row for line in lines if line.row is not None]
    return JsonLines(rows, tuple(line.number for line in lines if line.row is None))


def read(path: Path) -> JsonLines:
    """Reads a JSON-lines file; a missing file has no lines."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return JsonLines([], ())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the valid rows of a JSON-lines file; `read` also counts the bad lines."""
    return read(path).rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one row, see `append_rows`."""
    append_rows(path, [row])


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends all rows, or none if an OSError is raised; see `append_lines`."""
    append_lines(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_lines(path: Path, lines: str) -> None:
    """Appends complete lines, after terminating a last line that a crash has truncated.

    All lines are one write to a file opened for appending, so lines of several processes do not mix.

    Args:
        path: the file, created if it is missing.
        lines: lines, each with its newline.

    Raises:
        OSError: they cannot be written; no part of them stays in the file.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size, content = os.fstat(handle).st_size, lines.encode()
        if size and os.pread(handle, 1, size - 1) != b"\n":
            content = b"\n" + content
        written = 0
        try:
            while written < len(content):
                count = os.write(handle, content[written:])
                if not count:
                    raise OSError(f"only {written} of {len(content)} bytes were written")
                written += count
        except OSError:
            with contextlib.suppress(OSError):
                if content.startswith(os.pread(handle, len(content) + 1, size)):  # no other process has appended since
                    os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


class Tail:
    """Reads the rows that were added to a file since the last call; starts from the beginning if it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0
        self.rows: list[dict[str, Any]] = []
        """All rows read so far of the current file."""

    def read(self) -> list[dict[str, Any]]:
        """Returns new rows; an incomplete last line is read by a later call."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.rows = status.st_ino, 0, []
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        new = parse(whole).rows
        self.rows += new
        return new
