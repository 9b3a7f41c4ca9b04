"""Base class of the layouts of known corpora: files and rows of tables that are joined by a key."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import AudioFile, Span
from data_pipeline.corpora.records import Reject, reject_file
from data_pipeline.corpora.tables import rows_of


@dataclass(frozen=True)
class About:
    """Metadata of a recording from its corpus."""

    speaker: str = ""
    language: str = ""
    text: str = ""
    split: str = ""
    seconds: float = 0.0
    spans: tuple[Span, ...] = ()


class Row(NamedTuple):
    """A row of a corpus's table that names a file, as plain values."""

    key: str
    """Key of the recordings that it is of."""
    table: str
    number: int
    """From 1."""
    file_id: str
    """Path of the file below the corpus, as the row gives it."""
    language: str
    values: tuple[str, ...]
    """What the layout needs of it."""


@dataclass(frozen=True)
class Joined:
    """The recordings and rejects of one key."""

    known: Mapping[str, About]
    """Metadata by path; files that are left out are not recordings."""
    rejects: Sequence[Reject] = ()


class Layout(ABC):
    """The layout of a known corpus.

    Args:
        name: name of the corpus.
        store: its folder.
    """

    tables: ClassVar[re.Pattern[str]]
    """Matches the paths of the tables below the corpus, which are read but do not count as recordings."""

    def __init__(self, name: str, store: FileStore) -> None:
        self.name, self.store = name, store

    @abstractmethod
    def key(self, path: str) -> str | None:
        """Returns the key of a recording from its path below the corpus; None for a file that is not a recording."""

    @abstractmethod
    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the rows of the tables, whose paths are sorted.

        Raises:
            ConfigError: a table is missing or cannot be read.
        """

    @abstractmethod
    def join(self, paths: Sequence[str], rows: Sequence[Row]) -> Joined:
        """Joins the files and rows of one key."""

    def file(self, row: Row) -> AudioFile:
        """Returns the file that a row names."""
        return AudioFile("", row.file_id, self.name, language=row.language)

    def missing(self, row: Row) -> Reject:
        """Returns the reject of a row without a file."""
        error = f"row {row.number} of {row.table}: there is no such file"
        reject = reject_file(self.file(row), "discover", "vanished", error, row=row.number)
        return dataclasses.replace(reject, path=self.store.path(row.file_id))

    def bad_row(self, table: str, number: int, path: str, language: str, problem: str) -> Reject:
        """Returns the reject of a row that names no file."""
        file, error = AudioFile("", path, self.name, language=language), f"row {number} of {table}: {problem}"
        return reject_file(file, "discover", "bad_row", error, row=number)

    def lines(self, table: str) -> Iterator[tuple[int, str]]:
        """Yields (number, line) of a text file, split at newlines only; empty lines are skipped."""
        for number, line in enumerate(self.store.lines(table), start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r")
            if text.strip():
                yield number, text

    def table(self, path: str) -> Iterator[tuple[int, dict[str, str], str]]:
        """Yields (number, values, problem) of each row of a TSV table."""
        for row in rows_of(self.store.lines(path), "quoted_tsv"):
            yield row.number, {key: str(value) for key, value in row.values.items()}, row.problem


class PathLayout(Layout):
    """A layout whose paths say most; rows add to it, and the last one of a key counts."""

    @abstractmethod
    def about(self, path: str, row: Row | None) -> About | None:
        """Returns the metadata of a recording; None if it is none. row: the last one of its key; None without any."""

    def join(self, paths: Sequence[str], rows: Sequence[Row]) -> Joined:
        """Joins the files and rows of one key."""
        if not paths:
            return Joined({}, [self.missing(row) for row in rows])
        last = rows[-1] if rows else None
        return Joined({path: about for path in paths if (about := self.about(path, last))})
