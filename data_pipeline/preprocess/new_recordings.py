"""Finds the recordings that a plan does not have, or that earlier jobs could not read and that may be readable now."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.corpora.recordings import FileRow, Recordings, order_of
from data_pipeline.corpora.records import RecordingId, Reject
from data_pipeline.preprocess.plan_file import PlanTable

RETRIED: Final = ("read_error", "vanished", "changed", "needs_media")
"""Reasons of rejects that may be temporary: every later job reads the file again."""
CHUNK: Final = 200_000
"""Recordings that are looked up by path at a time."""
SAID: Final = ("speaker", "language", "text", "labels")
ODD: Final = r"^[^/]|//|/\.{1,2}(/|$)|/$"
"""Matches local paths that are relative or not normalised."""


class PlannedEntry(NamedTuple):
    """What a plan knows of a recording."""

    corpus: str
    file_id: str
    size: int
    mtime: str
    said: int
    """Hash of speaker, language, text and labels."""
    dropped: bool


@dataclass
class PlanComparison:
    """The recordings of a corpus in comparison with a plan."""

    fresh: Recordings
    """Recordings to process."""
    changed: int = 0
    """Recordings that have changed since they were planned, and are not processed again."""
    relabelled: int = 0
    """Recordings with another speaker, language, text or label than in the plan."""


def compare_with_plan(
    tables: Sequence[PlanTable], recordings: Recordings, failures: Mapping[RecordingId, Reject]
) -> PlanComparison:
    """Compares recordings with a plan. Both are sorted by the same order, and merged.

    Args:
        tables: the generations of the plan.
        recordings: the discovered recordings.
        failures: rejects of recordings that earlier jobs could not read.
    """
    if not tables:
        return PlanComparison(recordings)
    result, unknown = PlanComparison(Recordings(recordings.folder)), list[FileRow]()
    for row, before in _with_earlier(tables, recordings):
        if before is None:
            unknown.append(row)
        else:
            _add(result, row, before, failures)
        if len(unknown) == CHUNK:
            _add_by_path(result, tables, unknown, failures)
            unknown = []
    _add_by_path(result, tables, unknown, failures)
    return result


def _add(result: PlanComparison, row: FileRow, before: PlannedEntry, failures: Mapping[RecordingId, Reject]) -> None:
    """Adds a recording that is in the plan, if it is to be processed again."""
    changed = (before.size, before.mtime) != (row.size, row.mtime)
    failure = failures.get((before.corpus, before.file_id))
    retried = failure is not None and (changed or failure.reason in RETRIED)
    if retried or (changed and before.dropped):
        result.fresh.add(row)
    elif failure is None:
        result.changed += changed
        result.relabelled += before.said != _said(row)


def _said(row: FileRow) -> int:
    return hash((row.speaker, row.language, row.text, row.labels))


def _with_earlier(tables: Sequence[PlanTable], recordings: Recordings) -> Iterator[tuple[FileRow, PlannedEntry | None]]:
    """Yields each recording with its last entry in a unit of the plan, or else as a duplicate."""
    planned = ExternalSort(recordings.folder)
    for table in tables:
        for entry in _entries(table.batches(_COLUMNS)):
            planned.add(order_of(entry.corpus, entry.file_id), tuple(entry))
    entries = iter(planned)
    held = next(entries, None)
    for wanted, row in recordings.ordered():
        before: PlannedEntry | None = None
        while held is not None and held[0] <= wanted:
            found = PlannedEntry(*held[1])
            if held[0] == wanted and (before is None or before.dropped or not found.dropped):
                before = found
            held = next(entries, None)
        yield row, before


_COLUMNS: Final = ("corpus", "file_id", "size", "mtime", *SAID, "dropped")


def _entries(batches: Iterator[pa.RecordBatch]) -> Iterator[PlannedEntry]:
    for batch in batches:
        for corpus, file_id, size, mtime, *said, dropped in zip(
            *(batch[name].to_pylist() for name in _COLUMNS), strict=True
        ):
            yield PlannedEntry(corpus, file_id, size, mtime, hash(tuple(said)), bool(dropped))


def _add_by_path(
    result: PlanComparison, tables: Sequence[PlanTable], rows: Sequence[FileRow], failures: Mapping[RecordingId, Reject]
) -> None:
    """Adds recordings whose id is in no plan, unless the plan has their path under another id.

    Earlier versions used ids as they were written in manifests, such as ./a.wav, or an absolute path.
    """
    places = [(row.corpus, _normal(row.path)) for row in rows]
    wanted, paths = set(places), pa.array(sorted({path for _, path in places}), pa.binary())
    known: dict[tuple[str, bytes], PlannedEntry] = {}
    for table in tables if rows else ():
        for batch in table.batches([*_COLUMNS, "path"]):
            odd = pc.and_not(pc.match_substring_regex(batch["path"], ODD), pc.match_substring(batch["path"], "://"))
            kept = batch.filter(pc.and_(pc.or_(pc.is_in(batch["path"], paths), odd), pc.equal(batch["dropped"], "")))
            found = zip(_entries(iter([kept])), kept["path"].to_pylist(), strict=True)
            known |= {place: entry for entry, path in found if (place := (entry.corpus, _normal(path))) in wanted}
    for row, place in zip(rows, places, strict=True):
        if place in known:
            _add(result, row, known[place], failures)
        else:
            result.fresh.add(row)


def _normal(path: bytes) -> bytes:
    return path if b"://" in path else posixpath.normpath(os.path.abspath(path))  # noqa: PTH100
