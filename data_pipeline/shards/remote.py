"""Reads shards behind an fsspec URL (S3, GCS, HTTP …) by byte ranges; `cache.py` keeps whole local copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.core.retries import Backoff, StorageReadError, error_text, is_transient, retry
from data_pipeline.shards.local import Extent, ShardError, ShardFiles


class RemoteShards(ShardFiles):
    """Reads the bytes of each sample by range requests, those of a micro-batch concurrently."""

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        found: dict[Extent, bytes | ShardError] = {}
        backoff = Backoff(self.shards.patience)
        while left := [e for e in dict.fromkeys(wanted) if e not in found and e.shard not in self.bad]:
            failed: dict[Extent, BaseException] = {}
            for extent, got in zip(left, self._ranges(left), strict=True):
                if isinstance(got, BaseException) and is_transient(got):
                    failed[extent] = got
                else:
                    found[extent] = self._bytes_or_error(extent, got)
            if failed and not backoff.wait():
                raise self._given_up(failed)
        return [found.get(extent) or self.bad[extent.shard] for extent in wanted]

    def _ranges(self, extents: Sequence[Extent]) -> Sequence[bytes | BaseException]:
        found: dict[Extent, bytes | BaseException] = {}
        for root in sorted({self.records[extent.shard].tar_root for extent in extents}):
            here = [extent for extent in extents if self.records[extent.shard].tar_root == root]
            found |= zip(here, self._ranges_in(root, here), strict=True)
        return [found[extent] for extent in extents]

    def _ranges_in(self, root: str, extents: Sequence[Extent]) -> Sequence[bytes | BaseException]:
        store = self._store(root)
        paths = [store.path(self.records[extent.shard].shard) for extent in extents]
        starts = [extent.offset for extent in extents]
        ends = [extent.offset + extent.size for extent in extents]
        try:
            ranges: Sequence[bytes | BaseException] = store.fs.cat_ranges(paths, starts, ends, on_error="return")
        except Exception as error:  # some file systems raise errors for all ranges at once
            return [error] * len(extents)
        return ranges

    def _bytes_or_error(self, extent: Extent, got: Any) -> bytes | ShardError:
        if isinstance(got, BaseException):
            return self.mark_bad(extent.shard, f"cannot be read ({type(got).__name__}: {got})")
        return self._whole(extent, got)

    def _given_up(self, failed: Mapping[Extent, BaseException]) -> StorageReadError:
        extent, error = next(iter(failed.items()))
        return StorageReadError(
            f"{self.records[extent.shard].tar_root}/{self.records[extent.shard].shard}",
            f"cannot be read for data.retry_seconds={self.shards.patience:g} ({error_text(error)}); "
            "the run can be started again when the storage answers",
        )

    def _sizes_in(self, root: str) -> Mapping[str, int]:
        store = self._store(root)

        def listing() -> list[dict[str, Any]]:
            store.fs.invalidate_cache()
            return list(store.fs.ls(store.path(), detail=True))

        try:
            found = retry(listing, root, self.shards.patience)
        except FileNotFoundError:
            found = []
        return {info["name"].rstrip("/").rsplit("/", 1)[-1]: int(info.get("size") or 0) for info in found}
