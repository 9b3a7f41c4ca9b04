"""Reads and appends JSON-lines files: one JSON object per line, lines ended by a newline alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JsonLines:
    """The content of a JSON-lines file."""

    rows: list[dict[str, Any]]
    """The lines that are JSON objects, in order."""
    bad_lines: tuple[int, ...]
    """Numbers, from 1, of the other lines: damaged, cut off by a crash, or not an object."""


def parse(content: bytes) -> JsonLines:
    """Parses the bytes of a JSON-lines file; empty lines are ignored."""
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also bytes that are not UTF-8
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(number)
    return JsonLines(rows, tuple(bad))


def read(path: Path) -> JsonLines:
    """Reads a JSON-lines file; one that does not exist has no lines."""
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
    """Appends rows; a last line that a crash left without its newline is ended first.

    All rows are one write to a file opened for appending, so rows of several processes do not mix.
    """
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    end_torn_line(path)
    with path.open("ab", buffering=0) as file:
        file.write(content)


def end_torn_line(path: Path) -> None:
    """Ends a last line that has no newline, so that what is appended next starts its own line."""
    try:
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
    except FileNotFoundError:
        pass


class Tail:
    """Reads the rows that were added to a file since the last call; starts again when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0
        self.rows: list[dict[str, Any]] = []
        """All rows read so far of the file as it is now."""

    def read(self) -> list[dict[str, Any]]:
        """Returns the rows that are new; an unfinished last line waits for the next call."""
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
