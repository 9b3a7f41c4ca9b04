"""Tables of planned recordings on disk: `_plan/<sha256>.parquet`, one per generation of a plan.

A table is written and read in parts, since it may have more rows than fit into memory. The rows of a unit are
neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import AudioFile
from data_pipeline.corpora.recordings import FileRow, file_of, row_of

SPLITS: Final = ("train", "valid", "test")
PLAN_SCHEMA: Final = pa.schema(
    [
        ("unit", pa.string()),
        ("folder", pa.string()),
        ("dropped", pa.string()),
        ("same_as", pa.string()),
        ("path", pa.binary()),
        *((name, pa.string()) for name in FileRow._fields[1:8]),
        ("seconds", pa.float64()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
        ("spans", pa.string()),
        ("share", pa.float64()),
        ("offset", pa.float64()),
        ("samples", pa.int64()),
        ("image", pa.binary()),
        ("part", pa.string()),
    ]
)
"""Columns; dropped, same_as, share, offset and samples are set for duplicates. Earlier versions lack the last five."""
LATER: Final = len(FileRow._fields) - 2
"""Fields of a recording that stand before `share` in a table; the other ones are behind `samples`."""
ROW_GROUP: Final = 32_768
"""Rows that are written and read at a time."""
SECONDS_PER_BYTE: Final = {
    **dict.fromkeys(("wav", "aif", "aiff", "caf", "au", "sph", "w64", "rf64"), 1 / 32_000),
    "flac": 1 / 18_000,
    **dict.fromkeys(("mp3", "m4a", "aac", "wma"), 1 / 8_000),
    **dict.fromkeys(("opus", "ogg", "webm", "amr"), 1 / 4_000),
}


@dataclass(frozen=True)
class WorkUnit:
    """The recordings of one shard."""

    name: str
    files: tuple[AudioFile, ...]
    split: str = ""
    """Folder of the shard below `out`: train, valid, test, or "" for `out` itself."""


@dataclass(frozen=True)
class PlannedUnit:
    """A unit without its recordings, which are rows of a table."""

    name: str
    split: str
    table: str
    """Name of the table; "" in a dry run, which writes none."""
    first: int
    """Number of its first row."""
    files: int
    """Number of recordings, one per row."""
    seconds: float
    """Expected duration of all its recordings."""
    first_id: str
    """`file_id` of its first recording."""


@dataclass(frozen=True)
class Dropped:
    """A duplicate, which is in no unit."""

    file: AudioFile
    reason: str
    """exact or near."""
    same_as: str
    """corpus/file_id of the recording that is kept."""
    share: float = 1.0
    """Shared part of the shorter recording's speech."""
    offset_seconds: float = 0.0
    """Start of this recording in the kept one; negative if it begins earlier."""
    samples: int = 0
    """Its length at the output rate; 0 if it is unknown."""


def expected_seconds(path: bytes, seconds: float, size: int) -> float:
    """Returns the approximate duration of a recording in seconds, from the corpus or else from its size in bytes."""
    return seconds or size * SECONDS_PER_BYTE.get(
        path.rpartition(b".")[2].decode("utf-8", "replace").lower(), 1 / 16_000
    )


class TableWriter:
    """Writes one generation to a local file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd")
        self._rows: list[tuple[Any, ...]] = []

    def add_unit(self, name: str, split: str, rows: Iterable[FileRow]) -> None:
        """Adds the recordings of a unit."""
        self._rows += [(name, split, "", "", *row[:LATER], None, None, None, *row[LATER:]) for row in rows]
        while len(self._rows) >= ROW_GROUP:
            self._write()

    def add_dropped(self, drop: Dropped) -> None:
        """Adds a duplicate, after all units."""
        row = row_of(drop.file)
        more = (drop.share, drop.offset_seconds, drop.samples)
        self._rows.append(("", "", drop.reason, drop.same_as, *row[:LATER], *more, *row[LATER:]))
        if len(self._rows) >= ROW_GROUP:
            self._write()

    def close(self) -> str:
        """Completes the file and returns its sha256."""
        if self._rows:
            self._write()
        self._writer.close()
        return sha256_of(self.path)

    def _write(self) -> None:
        now, self._rows = self._rows[:ROW_GROUP], self._rows[ROW_GROUP:]
        columns = [
            pa.array(column, kind.type) for column, kind in zip(zip(*now, strict=True), PLAN_SCHEMA, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=PLAN_SCHEMA))


class PlanTable:
    """One generation on disk.

    Args:
        store: the data set.
        name: name of the table in `_plan`, without its ending.
    """

    def __init__(self, store: FileStore, name: str) -> None:
        self.store, self.name = store, name

    def __str__(self) -> str:
        return f"{self.store.root}/_plan/{self.name}.parquet"

    def sha256(self) -> str:
        """Returns the sha256 of the table."""
        with self.store.open(f"_plan/{self.name}.parquet") as file:
            return sha256_of(file)

    def batches(self, columns: Sequence[str], first: int = 0, count: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yields some columns in parts; columns that earlier versions lack are empty.

        Args:
            columns: names of columns of `PLAN_SCHEMA`.
            first: number of the first row.
            count: number of rows; None: all that follow.
        """
        with self.store.open(f"_plan/{self.name}.parquet") as file:
            table = pq.ParquetFile(file)
            there = [name for name in columns if name in table.schema_arrow.names]
            begin, end = 0, table.metadata.num_rows if count is None else first + count
            for group in range(table.num_row_groups):
                begin, start = begin + table.metadata.row_group(group).num_rows, begin
                if begin <= first or start >= end:
                    continue
                for batch in table.iter_batches(ROW_GROUP, [group], columns=there, use_threads=False):
                    kept = batch.slice(max(first - start, 0), max(end - max(start, first), 0))
                    start += batch.num_rows
                    if kept.num_rows:
                        yield _with_all(kept, columns)

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[FileRow]:
        """Yields recordings; see `batches`."""
        for batch in self.batches(FileRow._fields, first, count):
            columns = (column.to_pylist() for column in batch.columns)
            yield from (FileRow(*row) for row in zip(*columns, strict=True))

    def unit(self, planned: PlannedUnit) -> WorkUnit:
        """Returns a unit with its recordings."""
        files = tuple(file_of(row) for row in self.rows(planned.first, planned.files))
        return WorkUnit(planned.name, files, planned.split)

    def units(self) -> Iterator[PlannedUnit]:
        """Yields the units of this generation. Raises ValueError for a name that a plan does not give."""
        number, open_unit = 0, None
        for batch in self.batches(["unit", "folder", "dropped", "path", "seconds", "size", "file_id"]):
            for start, end in _runs(batch):
                name, folder, dropped = (batch[key][start].as_py() for key in ("unit", "folder", "dropped"))
                if dropped:
                    continue
                if not re.fullmatch(r"[0-9a-f]{16}", name) or folder not in ("", *SPLITS):
                    raise ValueError(f"unit {name!r} of folder {folder!r}: not a name that a plan gives")
                seconds = float(_seconds(batch.slice(start, end - start)).sum())
                if open_unit and (open_unit.name, open_unit.split) == (name, folder):
                    first, files, first_id = open_unit.first, open_unit.files, open_unit.first_id
                    seconds += open_unit.seconds
                else:
                    if open_unit:
                        yield open_unit
                    first, files, first_id = number + start, 0, batch["file_id"][start].as_py()
                open_unit = PlannedUnit(name, folder, self.name, first, files + end - start, seconds, first_id)
            number += batch.num_rows
        if open_unit:
            yield open_unit

    def dropped(self) -> Iterator[Dropped]:
        """Yields the duplicates of this generation."""
        more = ("dropped", "same_as", "share", "offset", "samples")
        for batch in self.batches([*FileRow._fields, *more]):
            for row in batch.filter(pa.compute.not_equal(batch["dropped"], "")).to_pylist():
                reason, same_as, *measures = (row.pop(name) for name in more)
                names = ("share", "offset_seconds", "samples")
                known = {name: value for name, value in zip(names, measures, strict=True) if value is not None}
                yield Dropped(file_of(FileRow(**row)), reason, same_as, **known)


def _with_all(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """Returns a batch with these columns; texts that are not there are empty, and numbers null."""
    kinds = [PLAN_SCHEMA.field(name).type for name in columns]
    empty: dict[Any, Any] = {pa.string(): "", pa.binary(): b""}
    made = [
        batch[name] if name in batch.schema.names else pa.repeat(pa.scalar(empty.get(kind), kind), batch.num_rows)
        for name, kind in zip(columns, kinds, strict=True)
    ]
    filled = [
        column.fill_null(empty[kind]) if kind in empty and column.null_count else column
        for column, kind in zip(made, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(filled, names=list(columns))


def _runs(batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of the rows of each unit."""
    new = np.zeros(batch.num_rows, bool)
    new[0] = True
    for name in ("unit", "folder", "dropped"):
        codes = batch[name].dictionary_encode().indices.to_numpy()
        new[1:] |= codes[1:] != codes[:-1]
    starts = np.flatnonzero(new).tolist()
    yield from zip(starts, [*starts[1:], batch.num_rows], strict=True)


def _seconds(batch: pa.RecordBatch) -> Any:
    """Returns the expected seconds of the recordings as an array."""
    seconds = np.array(batch["seconds"], np.float64)
    unknown = np.flatnonzero(seconds == 0)
    paths, sizes = batch["path"].take(pa.array(unknown)).to_pylist(), np.array(batch["size"])[unknown].tolist()
    seconds[unknown] = [expected_seconds(path, 0.0, size) for path, size in zip(paths, sizes, strict=True)]
    return seconds
