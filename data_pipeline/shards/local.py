"""Bytes and index rows of shards on a local file system; remote.py has the other ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.lru import LruCache
from data_pipeline.shards.records import DoneRecord, index_name

Array = npt.NDArray[Any]
CHUNK = 1 << 22


class ReadSchedule(Protocol):
    """The order in which shards will be read, for caches that fetch ahead."""

    def windows(self, epoch: int) -> Iterable[Array]:
        """Numbers of the shards of each shuffle window of `epoch`, window by window."""
        ...

    def window_of(self, epoch: int, step: int) -> int:
        """Number of the shuffle window that holds optimizer step `step` of `epoch`."""
        ...

    def next_use(self, epoch: int, window: int) -> Array:
        """(S,) windows from `window` of `epoch` until each shard is read next."""
        ...


class ShardError(ValueError):
    """A shard that cannot be read as its record says: missing, truncated, altered, or not audio."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"{shard}: {reason}")
        self.shard, self.reason = shard, reason


@dataclass(frozen=True)
class Extent:
    """`size` bytes from `offset` of shard number `shard`."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie: `table` has the columns of X.parquet; the rest is taken out for speed."""

    table: Any
    keys: list[str]
    wav: Array
    payload_offset: Array
    payload_size: Array
    n_samples: Array

    def text(self, column: str, row: int) -> str:
        """One cell as text."""
        value = self.table.column(column)[row].as_py()
        return "" if value is None else str(value)


class ShardFiles:
    """The shards below the folder `root`. Each process opens files for itself; those of the last shards stay open."""

    def __init__(self, root: str, records: Sequence[DoneRecord], keep: int, verify: bool) -> None:
        self.root, self.records, self.keep, self.verify = root, records, keep, verify
        self.bad: dict[int, ShardError] = {}
        self._files = LruCache[int, int](keep, os.close)
        self._indexes = LruCache[int, ShardIndex](keep)

    def check(self) -> list[ShardError]:
        """Finds shards that are missing or not as long as recorded; looks at sizes only."""
        for number, (record, size) in enumerate(zip(self.records, self._sizes(), strict=True)):
            if size is None:
                self._mark(number, "is missing")
            elif size != record.bytes:
                self._mark(number, f"has {size} bytes; its record says {record.bytes}")
            elif not self.has_index(number):
                self._mark(number, f"its index {index_name(record.shard)} is missing")
        return list(self.bad.values())

    def index(self, number: int) -> ShardIndex:
        """Raises ShardError if the index is missing or does not fit its record."""
        if number in self.bad:
            raise self.bad[number]
        return self._indexes.get(number, lambda: self._read_index(number))

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        """The bytes of each extent, or what went wrong with it."""
        return [self._read_one(extent) for extent in wanted]

    def follow(self, schedule: ReadSchedule) -> None:
        """Prepares for reads in the order of `schedule`; does nothing where nothing is fetched ahead."""

    def look_ahead(self, epoch: int, step: int) -> None:
        """Fetches what is read next after `step` of `epoch`; does nothing where nothing is fetched ahead."""

    def close(self) -> None:
        """Closes all files."""
        self._files.clear()

    def _sizes(self) -> list[int | None]:
        with os.scandir(self.root) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return [sizes.get(record.shard) for record in self.records]

    def _local_path(self, number: int) -> Path:
        """Where shard `number` is, after it was fetched if need be. Raises OSError or ShardError."""
        return Path(self.root, self.records[number].shard)

    def _read_one(self, extent: Extent) -> bytes | ShardError:
        number = extent.shard
        if number in self.bad:
            return self.bad[number]
        try:
            data = os.pread(self._file(number), extent.size, extent.offset)
        except OSError as error:
            return self._mark(number, f"cannot be read ({error.strerror or error})")
        except ShardError as error:
            return error
        return self._whole(extent, data)

    def _whole(self, extent: Extent, data: bytes) -> bytes | ShardError:
        if len(data) == extent.size:
            return data
        return self._mark(extent.shard, f"ends inside the sample at byte {extent.offset}: it was truncated")

    def _file(self, number: int) -> int:
        return self._files.get(number, lambda: self._open(number))

    def _open(self, number: int) -> int:
        path = self._local_path(number)
        if self.verify and sha256_of(path) != self.records[number].sha256:
            raise self._mark(number, "checksum mismatch: its sha256 is not the recorded one")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _mark(self, number: int, reason: str) -> ShardError:
        """Remembers that a shard is bad."""
        self.bad[number] = ShardError(self.records[number].shard, reason)
        return self.bad[number]

    def read_table(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The index of a shard, or some of its columns. Raises OSError or ValueError."""
        record = self.records[number]
        file = pq.ParquetFile(self._index_source(number), read_dictionary=["corpus", "language"])
        table = file.read(columns=columns, use_threads=False)
        if table.num_rows != record.segments:
            raise ValueError(f"it has {table.num_rows} rows instead of the recorded {record.segments}")
        return table

    def has_index(self, number: int) -> bool:
        """Whether the index of a shard is there."""
        return Path(self._index_source(number)).exists()

    def _index_source(self, number: int) -> Any:
        return str(Path(self.root, index_name(self.records[number].shard)))

    def _read_index(self, number: int) -> ShardIndex:
        try:
            table = self.read_table(number)
            columns = {name: table.column(name).to_numpy() for name in ("payload_offset", "payload_size", "n_samples")}
        except (OSError, ValueError, KeyError) as error:
            raise self._mark(number, f"its index cannot be read ({error})") from None
        keys, wav = table.column("key").to_pylist(), pc.equal(table.column("suffix"), "wav").to_numpy()
        return ShardIndex(table, keys, wav, **{name: np.asarray(column) for name, column in columns.items()})
