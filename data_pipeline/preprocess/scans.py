"""Reads the hashes and fingerprints of recordings in `_scan/`, and numbers the recordings."""

from __future__ import annotations

import hashlib
import io
import itertools
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.storage import FileStore
from data_pipeline.corpora.recordings import Recordings
from data_pipeline.corpora.records import RecordingId
from data_pipeline.preprocess.duplicate_search import Table

NOBODY: Final = -1
"""Owner of a row whose recording is in no unit, has changed, or is in an earlier scan."""


@dataclass
class Scans:
    """The scans of a data set, whose recordings are numbered: older ones first, then new ones, each by name."""

    store: FileStore
    files: list[str]
    """Names of the scans."""
    owners: list[npt.NDArray[np.int32]]
    """Number of the recording of each row, by scan."""
    recordings: int
    """Number of recordings."""
    older: int
    """Number of older recordings."""
    sorted_names: ExternalSort
    """See `_grouped`."""

    def tables(self, columns: list[str]) -> Iterator[Table]:
        """Yields the owners of the rows of each scan and some columns; each owner once."""
        for name, owners in zip(self.files, self.owners, strict=True):
            rows = np.flatnonzero(owners != NOBODY)
            kept: Any = _read(self.store, name).take(rows)
            empty = pa.nulls(len(rows), pa.int64())
            found = [kept[name].combine_chunks() if name in kept.column_names else empty for name in columns]
            yield owners[rows].astype(np.uint32), found

    def names(self, numbers: Collection[int]) -> dict[int, RecordingId]:
        """Returns the names of some recordings."""
        wanted = set(numbers)
        named = _numbered(self.sorted_names, self.older) if wanted else ()
        return {number: name for number, name, _ in named if number in wanted}

    def lengths(self, numbers: Collection[int]) -> dict[int, int]:
        """Returns the length in samples of some recordings; scans of earlier versions lack it."""
        found: dict[int, int] = {}
        for owners, (column,) in self.tables(["samples"]) if numbers else ():
            inside = np.isin(owners, np.array(sorted(numbers), np.uint32))
            lengths = column.fill_null(0).filter(pa.array(inside)).to_pylist()
            found |= zip(owners[inside].tolist(), lengths, strict=True)
        return found


def rank(store: FileStore, fresh: Recordings, older: Iterable[RecordingId]) -> Scans:
    """Numbers the recordings of a data set, and finds the rows of its scans that are theirs.

    Args:
        store: the data set.
        fresh: the new recordings.
        older: the recordings that are already in a unit, possibly repeatedly.

    Raises:
        OSError: a scan is damaged.
    """
    names, files, owners = ExternalSort(fresh.folder), store.names("_scan", ".parquet"), list[npt.NDArray[np.int32]]()
    for name in older:
        names.add(name, ("older",))
    for row in fresh:
        names.add((row.corpus, row.file_id), ("new", row.size, row.mtime))
    for number, file in enumerate(files):
        table = _read(store, file, ["corpus", "file_id", "size", "mtime"])
        owners.append(np.full(table.num_rows, NOBODY, np.int32))
        for place, (corpus, file_id, *stamp) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
            names.add((corpus, file_id), ("row", number, place, *stamp))
    count = older_count = sum(any(value[0] == "older" for value in values) for _, values in _grouped(names))
    for number, _, values in _numbered(names, older_count):
        count = max(count, number + 1)
        stamps = [value[1:] for value in values if value[0] == "new"]
        # scans of earlier jobs may contain recordings that are in no unit or have changed
        rows = [value for value in values if value[0] == "row" and (not stamps or value[3:] in stamps)]
        for _, scan, place, *_ in rows[:1]:
            owners[scan][place] = number
    return Scans(store, files, owners, count, older_count, names)


def _grouped(names: ExternalSort) -> Iterator[tuple[RecordingId, list[Any]]]:
    """Yields the values of each name: ("older",), ("new", size, mtime) or ("row", scan, row, size, mtime)."""
    for name, same in itertools.groupby(names, key=operator.itemgetter(0)):
        yield name, [value for _, value in same]


def _numbered(names: ExternalSort, older: int) -> Iterator[tuple[int, RecordingId, list[Any]]]:
    """Yields (number, name, values) of each recording; names that only scans have are left out."""
    counts = {"older": 0, "new": older}
    for name, values in _grouped(names):
        kinds = {value[0] for value in values}
        kind = "older" if "older" in kinds else "new"
        if kind in kinds:
            yield counts[kind], name, values
            counts[kind] += 1


def _read(store: FileStore, name: str, columns: list[str] | None = None) -> Any:
    content = store.read(f"_scan/{name}")
    if scan_is_altered(name, content):
        raise OSError(f"{store.root}/_scan/{name}: checksum mismatch; remove it and run the same command again")
    return pq.ParquetFile(io.BytesIO(content)).read(columns, use_threads=False)


def scan_is_altered(name: str, content: bytes) -> bool:
    """Returns whether the content of a scan does not match the hash in its name."""
    return short_hash(content) != name.removesuffix(".parquet").rpartition("-")[2]


def short_hash(content: bytes) -> str:
    """Returns 64 bits of the sha256 of some content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:16]
