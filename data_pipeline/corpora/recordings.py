"""The recordings of a corpus as rows of plain values, sorted on disk, so that a corpus need not fit into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.types import AudioFile, Span


class FileRow(NamedTuple):
    """An `AudioFile` as plain values."""

    path: bytes
    file_id: str
    corpus: str
    speaker: str
    language: str
    text: str
    split: str
    labels: str
    """JSON with sorted names."""
    seconds: float
    size: int
    mtime: str
    spans: str
    """JSON; "" without any."""
    image: bytes
    part: str = ""
    """Seconds of a part of a long recording, such as 1800,3600 or 3600, for all that follows; "" for a whole one."""


Order = tuple[str, str, str]
"""(hash of the name, file_id, corpus): recordings are sorted by it, so that neighbours are of different folders."""


class Recordings:
    """Recordings in the order of a hash of their names: `append` them all, then iterate, as often as needed.

    Of several recordings with the same corpus and id the first one counts; see `repeated`.

    Args:
        folder: folder for large corpora; None: that for temporary files.
        parts_of: returns the parts of a recording, which are added instead of it.
    """

    def __init__(self, folder: Path | None = None, parts_of: Callable[[FileRow], list[FileRow]] | None = None) -> None:
        self.folder, self._parts_of = folder, parts_of
        self._sorted = ExternalSort(folder)

    def append(self, file: AudioFile, place: int | None = None) -> None:
        """Adds a recording. place: its place in the corpus; None: after the ones before."""
        self.add(row_of(file), place)

    def add(self, row: FileRow, place: int | None = None, order: Order | None = None) -> None:
        """Adds the row of a recording, like `append`. order: that of `order_of`, if it is known."""
        place = len(self._sorted) if place is None else place
        for part in (row,) if self._parts_of is None else self._parts_of(row):
            known = order if part is row else None
            self._sorted.add(known or order_of(part.corpus, part.file_id), (place, tuple(part)))

    @property
    def added(self) -> int:
        """How many were added, including repeated ones."""
        return len(self._sorted)

    def __bool__(self) -> bool:
        return len(self._sorted) > 0

    def __iter__(self) -> Iterator[FileRow]:
        return (row for _, row in self.ordered())

    def ordered(self) -> Iterator[tuple[Order, FileRow]]:
        """Yields the order and row of each recording."""
        last = None
        for order, (_, row) in self._sorted:
            if order != last:
                last = order
                yield order, FileRow(*row)

    def repeated(self) -> list[AudioFile]:
        """Returns the recordings whose corpus and id an earlier one has."""
        return self._select(repeated=True)

    def in_place(self) -> list[AudioFile]:
        """Returns all recordings in the order of the corpus, for corpora that fit into memory."""
        return self._select(repeated=False)

    def _select(self, *, repeated: bool) -> list[AudioFile]:
        last, found = None, list[tuple[int, Any]]()
        for order, value in self._sorted:
            if (order == last) == repeated:
                found.append(value)
            last = order
        return [file_of(FileRow(*row)) for _, row in sorted(found)]


def name_hash(*parts: str) -> str:
    """Returns 64 bits of the sha256 of texts, in hexadecimal."""
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def order_of(corpus: str, file_id: str) -> Order:
    """Returns the order of a recording."""
    return name_hash(corpus, file_id), file_id, corpus


def row_of(file: AudioFile) -> FileRow:
    """Returns a recording as plain values."""
    return FileRow(
        os.fsencode(file.path),
        file.file_id,
        file.corpus,
        file.speaker,
        file.language,
        file.text,
        file.split,
        json.dumps(dict(file.labels), sort_keys=True) if file.labels else "{}",
        file.seconds,
        file.size,
        file.mtime,
        _spans_json(file.spans),
        os.fsencode(file.image),
        "" if file.part is None else f"{file.part[0]},{'' if file.part[1] is None else file.part[1]}",
    )


def file_of(row: FileRow) -> AudioFile:
    """Returns the recording of a row."""
    return AudioFile(
        path=os.fsdecode(row.path),
        file_id=row.file_id,
        corpus=row.corpus,
        speaker=row.speaker,
        language=row.language,
        text=row.text,
        split=row.split,
        labels=json.loads(row.labels) if row.labels != "{}" else {},
        seconds=row.seconds,
        size=row.size,
        mtime=row.mtime,
        spans=tuple(Span(**span) for span in json.loads(row.spans)) if row.spans else (),
        image=os.fsdecode(row.image),
        part=_part_of(row.part) if row.part else None,
    )


def _part_of(text: str) -> tuple[int, int | None]:
    begin, _, end = text.partition(",")
    return int(begin), int(end) if end else None


def licences_of(row: FileRow, default: str) -> set[str]:
    """Returns the licences of a recording or of its parts: their label `licence` or `license`, or else `default`."""
    if "licen" not in row.labels and not row.spans:
        return {default} - {""}
    file = file_of(row)
    labels = [span.labels for span in file.spans] or [file.labels]
    return {one.get("licence") or one.get("license") or default for one in labels} - {""}


def recordings_of(files: Iterable[AudioFile]) -> Recordings:
    """Returns some recordings as rows."""
    found = Recordings()
    for file in files:
        found.append(file)
    return found


ALWAYS: Final = ("start", "stop", "speaker", "text", "labels")
"""Fields of spans that are always written, since names of units depend on them."""


def _spans_json(spans: Iterable[Span]) -> str:
    """Returns spans as JSON, "" for none; fields with their default value are omitted."""
    return json.dumps([_span_values(span) for span in spans], sort_keys=True) if spans else ""


def _span_values(span: Span) -> dict[str, Any]:
    values = dataclasses.asdict(span)
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(span)
        if field.name in ALWAYS or values[field.name] != field.default
    }
