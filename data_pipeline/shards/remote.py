"""Shards behind an fsspec URL (S3, GCS, ...): ranged reads, or whole local copies kept by what the plan needs next."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from data_pipeline.core.storage import FileStore
from data_pipeline.shards.local import Extent, ShardError, ShardFiles
from data_pipeline.shards.records import DoneRecord, index_name


class RemoteShards(ShardFiles):
    """Reads the bytes of each sample by range requests, those of a micro-batch at the same time."""

    def __init__(self, root: str, records: Sequence[DoneRecord], keep: int, verify: bool) -> None:
        super().__init__(root, records, keep, verify)
        self._opened: tuple[int, FileStore] | None = None

    @property
    def _store(self) -> FileStore:
        """Connections do not survive a fork, so each process has its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), FileStore(self.root))
        return self._opened[1]

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        good = [extent for extent in wanted if extent.shard not in self.bad]
        paths = [self._store.path(self.records[extent.shard].shard) for extent in good]
        starts = [extent.offset for extent in good]
        ends = [extent.offset + extent.size for extent in good]
        data = self._store.fs.cat_ranges(paths, starts, ends, on_error="return") if good else []
        found = {extent: self._judge(extent, got) for extent, got in zip(good, data, strict=True)}
        return [self.bad[extent.shard] if extent not in found else found[extent] for extent in wanted]

    def has_index(self, number: int) -> bool:
        return self._store.exists(index_name(self.records[number].shard))

    def _judge(self, extent: Extent, got: Any) -> bytes | ShardError:
        if isinstance(got, Exception):
            return self._mark(extent.shard, f"cannot be read ({type(got).__name__}: {got})")
        return self._whole(extent, got)

    def _sizes(self) -> list[int | None]:
        found = {path.rsplit("/", 1)[-1]: info for path, info in self._listing().items()}
        return [found.get(record.shard) for record in self.records]

    def _listing(self) -> dict[str, int]:
        self._store.fs.invalidate_cache()
        return {info["name"]: int(info.get("size") or 0) for info in self._store.fs.ls(self._store.path(), detail=True)}

    def _index_source(self, number: int) -> Any:
        return io.BytesIO(self._store.read(index_name(self.records[number].shard)))
