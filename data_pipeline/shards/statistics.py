"""Counts the segments of a data set by corpus, language and speaker, mostly from one file: `_packs/columns.parquet`.

The file has some columns of all indexes, each index in one row group under its sha256. Indexes that it lacks are read
themselves, so it may be missing, old or damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.packed_files import FEWEST, UNUSABLE
from data_pipeline.core.storage import FileStore
from data_pipeline.shards.records import INDEX_SCHEMA, DoneRecord, read_index

COLUMNS: Final = ("n_samples", "snr_db", "level_dbfs", "speaker", "corpus", "language")
PACK: Final = "_packs/columns.parquet"
PACK_SCHEMA: Final = pa.schema([("index", pa.string()), *(INDEX_SCHEMA.field(name) for name in COLUMNS)])
GROUP_ROWS: Final = 100_000
"""Segments of a row group, which ends with a shard."""
MOST_PARTS: Final = 1_000
"""Indexes that are held one by one."""


class SpeakerKey(NamedTuple):
    """A speaker of a corpus in one language; the same name in two corpora is two speakers."""

    corpus: str
    language: str
    name: str
    """"" for segments whose corpus names none."""


@dataclass
class SegmentAmount:
    """A number of segments and their length."""

    segments: int = 0
    samples: int = 0

    def add(self, other: SegmentAmount) -> None:
        """Adds another amount."""
        self.segments += other.segments
        self.samples += other.samples


@dataclass
class SegmentStatistics:
    """SegmentStatistics of segments. Twelve bytes of each segment are in memory."""

    speakers: dict[SpeakerKey, SegmentAmount] = field(default_factory=dict)
    _values: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Adds segments: a table with `COLUMNS`."""
        for name, kind in (("n_samples", np.uint32), ("snr_db", np.float32), ("level_dbfs", np.float32)):
            values = table[name].to_numpy(zero_copy_only=False).astype(kind)
            self._values.setdefault(name, []).append(values)
        sums = table.group_by(["corpus", "language", "speaker"], use_threads=False).aggregate(
            [("n_samples", "count"), ("n_samples", "sum")]
        )
        names = ("corpus", "language", "speaker", "n_samples_count", "n_samples_sum")
        for corpus, language, speaker, count, samples in zip(*(sums[name].to_pylist() for name in names), strict=True):
            key = SpeakerKey(corpus or "", language or "", speaker or "")
            self.speakers.setdefault(key, SegmentAmount()).add(SegmentAmount(count, samples))

    def values(self, name: str) -> npt.NDArray[Any]:
        """Returns n_samples, snr_db or level_dbfs of all segments."""
        return np.concatenate(self._values.get(name) or [np.zeros(0, np.float32)])

    def total(self, *fields: str) -> dict[tuple[str, ...], SegmentAmount]:
        """Returns the amounts by some fields of `SpeakerKey`."""
        found: dict[tuple[str, ...], SegmentAmount] = {}
        for speaker, amount in self.speakers.items():
            key = tuple(value for name, value in speaker._asdict().items() if name in fields)
            found.setdefault(key, SegmentAmount()).add(amount)
        return found

    def named(self, *fields: str) -> dict[tuple[str, ...], int]:
        """Returns the number of named speakers by some fields of a key; one with two languages counts once."""
        found: dict[tuple[str, ...], set[tuple[str, str]]] = {}
        for speaker in self.speakers:
            key = tuple(value for name, value in speaker._asdict().items() if name in fields)
            found.setdefault(key, set()).update({(speaker.corpus, speaker.name)} if speaker.name else ())
        return {key: len(names) for key, names in found.items()}


def statistics_of(sets: Iterable[tuple[str, Sequence[DoneRecord]]]) -> SegmentStatistics:
    """Returns the statistics of data sets.

    Args:
        sets: (root, finished units) of each.

    Raises:
        ValueError: an index or a tar is missing or altered.
    """
    found = SegmentStatistics()
    for root, records in sets:
        for _, table in _indexes(FileStore(root), records):
            found.add(table)
    return found


def write_columns(root: str, records: Sequence[DoneRecord]) -> None:
    """Writes the columns of all indexes of a data set, unless they are up to date or there are few shards."""
    store, shards = FileStore(root), [record for record in records if record.shard]
    if len(shards) < FEWEST or {name for name, _ in _packed(store, ["index"])} == {one.index_sha256 for one in shards}:
        return
    with store.scratch() as scratch:
        with pq.ParquetWriter(scratch / "pack", PACK_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            held, rows = list[pa.Table](), 0
            for name, table in _indexes(store, shards):
                held.append(table.add_column(0, "index", pa.repeat(name, table.num_rows)).cast(PACK_SCHEMA))
                rows += table.num_rows
                if rows >= GROUP_ROWS:
                    writer.write_table(pa.concat_tables(held))
                    held, rows = [], 0
                elif len(held) >= MOST_PARTS:
                    held = [pa.concat_tables(held).combine_chunks()]
            if held:
                writer.write_table(pa.concat_tables(held))
        store.put(scratch / "pack", PACK)


def _indexes(store: FileStore, records: Sequence[DoneRecord]) -> Iterator[tuple[str, pa.Table]]:
    """Yields (sha256 of the index, its `COLUMNS`) of each shard."""
    sizes = store.stamps("", ".tar")
    missing = {record.index_sha256: record for record in records if record.shard}
    if len(missing) >= FEWEST:
        for name, table in _packed(store, ["index", *COLUMNS]):
            record = missing.get(name)
            # read_index says what is wrong with a tar
            if record and not record.location and sizes.get(record.shard, (0, ""))[0] == record.bytes:
                del missing[name]
                yield name, table.select(list(COLUMNS))
    for name, record in missing.items():
        yield name, _with_columns(read_index(store.root, record))


def _with_columns(index: pa.Table) -> pa.Table:
    """Returns the `COLUMNS` of an index; those that another writer left out are null."""
    columns = [
        index[name] if name in index.column_names else pa.nulls(index.num_rows, INDEX_SCHEMA.field(name).type)
        for name in COLUMNS
    ]
    return pa.table(columns, names=list(COLUMNS))


def _packed(store: FileStore, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Yields (sha256, columns) of each index in the pack, up to where it is damaged."""
    with contextlib.suppress(*UNUSABLE), store.open(PACK) as file:
        pack = pq.ParquetFile(file, page_checksum_verification=True)
        for group in range(pack.num_row_groups):
            table = pack.read_row_group(group, columns, use_threads=False)
            names = table["index"].to_numpy(zero_copy_only=False)
            starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]).tolist() if len(names) else []
            for start, end in zip(starts, [*starts[1:], len(names)], strict=False):
                yield str(names[start]), table.slice(start, end - start)
