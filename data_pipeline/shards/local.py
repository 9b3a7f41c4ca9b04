"""Reads bytes and index rows of shards on a local file system; `remote.py` reads those behind URLs."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.lru import LruCache
from data_pipeline.core.retries import PATIENCE, StorageError, error_text
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.shards.index_rows import INDEX_ERRORS, numbers, validate_index, validate_lengths
from data_pipeline.shards.records import DoneRecord, index_name

Array = npt.NDArray[Any]
CHUNK = 1 << 22
LABELS_IN_COLUMNS = b"auricle.labels_in_columns"
"""Key of an index's metadata; set if all labels are columns, so that the samples' JSON need not be read."""


class ReadSchedule(Protocol):
    """The order in which shards will be read, for caches that fetch ahead."""

    def windows(self, epoch: int) -> Iterable[Array]:
        """Yields the numbers of the shards of each shuffle window of `epoch`, window by window."""
        ...

    def window_of(self, epoch: int, step: int) -> int:
        """Returns the number of the shuffle window of optimizer step `step` of `epoch`."""
        ...

    def next_use(self, epoch: int, window: int) -> Array:
        """Returns the number of windows from `window` of `epoch` until each shard is read next, (S,)."""
        ...


class ShardError(ValueError):
    """Raised for a shard that does not match its record: missing, truncated, altered, or not audio."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"{shard}: {reason}")
        self.shard, self.reason = shard, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.reason)


@dataclass(frozen=True)
class Extent:
    """`size` bytes from `offset` of shard number `shard`."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """Positions of the samples of one shard: `table` has the columns of X.parquet; the other fields are copies."""

    table: Any
    keys: list[str]
    wav: Array
    payload_offset: Array
    payload_size: Array
    n_samples: Array

    @property
    def has_all_labels(self) -> bool:
        """Whether all labels of the samples are columns of the table."""
        return LABELS_IN_COLUMNS in (self.table.schema.metadata or {})

    def text(self, column: str, row: int) -> str:
        """Returns one cell as text."""
        value = self.table.column(column)[row].as_py()
        return "" if value is None else str(value)


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set, and how to read them.

    records: the finished shards; each names its folder.
    keep: number of shards whose index and file handle stay open.
    verify: whether to verify the sha256 of a shard before its first use.
    patience: seconds for which reads of remote storage are retried after transient errors.
    """

    records: Sequence[DoneRecord]
    keep: int = 64
    verify: bool = False
    patience: float = PATIENCE

    @property
    def tar_roots(self) -> list[str]:
        """Folders or URLs of the tars, sorted."""
        return sorted({record.tar_root for record in self.records})

    @property
    def remote(self) -> bool:
        """Whether the tars are behind URLs. Raises ConfigError where only some are."""
        remote = {is_url(root) for root in self.tar_roots}
        if len(remote) > 1:
            listed = ", ".join(self.tar_roots)
            raise ConfigError(f"data.shards: some are local and some remote ({listed}); copy them to one kind of place")
        return remote == {True}


class ShardFiles:
    """Reads the shards of a set from local files. Each process has its own open files, the most recently used ones."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.records = shards, shards.records
        self.bad: dict[int, ShardError] = {}
        self._stores: dict[str, FileStore] = {}
        self._stores_of = 0
        self._files = LruCache[int, int](shards.keep, os.close)
        self._indexes = LruCache[int, ShardIndex](shards.keep)

    def check(self) -> list[ShardError]:
        """Returns errors of shards that are missing or differ in size from their record; does not read them."""
        roots = {record.root for record in self.records}
        present = {root: set(self._store(root).names("", ".parquet")) for root in roots}
        for number, (record, size) in enumerate(zip(self.records, self._sizes(), strict=True)):
            if record.refused:
                self.mark_bad(number, record.refused)
            elif size is None:
                self.mark_bad(number, "is missing")
            elif size != record.bytes:
                self.mark_bad(number, f"has {size} bytes; its record says {record.bytes}")
            elif index_name(record.shard) not in present[record.root]:
                self.mark_bad(number, f"its index {index_name(record.shard)} is missing")
        return list(self.bad.values())

    def index(self, number: int) -> ShardIndex:
        """Returns the index of a shard. Raises ShardError if it is missing or does not match its record."""
        if number in self.bad:
            raise self.bad[number]
        return self._indexes.get(number, lambda: self._read_index(number))

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        """Returns the bytes of each extent, or the error of its shard.

        Raises:
            StorageReadError: the storage does not answer.
            StorageWriteError: the cache of copies cannot be written.
        """
        return [self._read_one(extent) for extent in wanted]

    def follow(self, schedule: ReadSchedule) -> None:
        """Prepares for reads in the order of `schedule`; does nothing without prefetching."""

    def look_ahead(self, epoch: int, step: int) -> None:
        """Prefetches the shards that are read after `step` of `epoch`; does nothing without prefetching."""

    def close(self) -> None:
        """Closes all files."""
        self._files.clear()

    def read_lengths(self, number: int, more: Sequence[str] = ()) -> pa.Table:
        """Returns the columns n_samples, corpus and language of a shard's index. Raises ShardError.

        Args:
            number: of the shard.
            more: further columns, which may be missing.
        """
        try:
            table = self._read_table(number, ["n_samples", "corpus", "language", *more])
            validate_lengths(table)
        except StorageError:
            raise
        except INDEX_ERRORS as error:
            raise self.mark_bad(number, f"its index cannot be used ({error_text(error)})") from None
        return table

    def _sizes(self) -> list[int | None]:
        """Returns the size of each shard in bytes; None for a missing one."""
        sizes = {root: self._sizes_in(root) for root in self.shards.tar_roots}
        return [sizes[record.tar_root].get(record.shard) for record in self.records]

    def _sizes_in(self, root: str) -> Mapping[str, int]:
        """Returns the size of each file in a folder, in bytes."""
        try:
            with os.scandir(self._store(root).root) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _local_path(self, number: int) -> Path:
        """Returns the path of shard `number`, fetched if necessary. Raises OSError or ShardError."""
        record = self.records[number]
        return Path(self._store(record.tar_root).path(record.shard))

    def _store(self, root: str) -> FileStore:
        """Returns the store at `root`. Connections do not survive a fork, so each process has its own."""
        if self._stores_of != os.getpid():
            self._stores, self._stores_of = {}, os.getpid()
        if root not in self._stores:
            self._stores[root] = FileStore(root, self.shards.patience)
        return self._stores[root]

    def _read_one(self, extent: Extent) -> bytes | ShardError:
        number = extent.shard
        if number in self.bad:
            return self.bad[number]
        try:
            data = os.pread(self._file(number), extent.size, extent.offset)
        except StorageError:
            raise
        except OSError as error:
            return self.mark_bad(number, f"cannot be read ({error_text(error)})")
        except ShardError as error:
            return error
        return self._whole(extent, data)

    def _whole(self, extent: Extent, data: bytes) -> bytes | ShardError:
        if len(data) == extent.size:
            return data
        return self.mark_bad(extent.shard, f"ends inside the sample at byte {extent.offset}: it was truncated")

    def _file(self, number: int) -> int:
        return self._files.get(number, lambda: self._open(number))

    def _open(self, number: int) -> int:
        path = self._local_path(number)
        if self.shards.verify and sha256_of(path) != self.records[number].sha256:
            raise self.mark_bad(number, "checksum mismatch: its sha256 is not the recorded one")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def mark_bad(self, number: int, reason: str) -> ShardError:
        """Records that a shard is bad; returns the error."""
        self.bad[number] = ShardError(self.records[number].shard, reason)
        return self.bad[number]

    def _read_table(self, number: int, columns: list[str] | None = None) -> pa.Table:
        record = self.records[number]
        store, name = self._store(record.root), index_name(record.shard)
        source = store.path(name) if store.local else io.BytesIO(store.read(name))
        file = pq.ParquetFile(source, read_dictionary=["corpus", "language"])
        if file.metadata.num_rows != record.segments:
            raise ValueError(f"it has {file.metadata.num_rows} rows instead of the recorded {record.segments}")
        return file.read(columns=columns, use_threads=False)

    def _read_index(self, number: int) -> ShardIndex:
        try:
            table = self._read_table(number)
            validate_index(table, self.records[number].bytes)
        except StorageError:
            raise
        except INDEX_ERRORS as error:
            raise self.mark_bad(number, f"its index cannot be used ({error_text(error)})") from None
        return ShardIndex(
            table=table,
            keys=table.column("key").to_pylist(),
            wav=pc.equal(table.column("suffix"), "wav").fill_null(False).to_numpy(),
            payload_offset=numbers(table, "payload_offset"),
            payload_size=numbers(table, "payload_size"),
            n_samples=numbers(table, "n_samples"),
        )
