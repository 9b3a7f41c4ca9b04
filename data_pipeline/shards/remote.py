"""Shards behind an fsspec URL (S3, GCS, ...): ranged reads, or whole local copies kept by what the plan needs next."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.sampling.config import ReaderConfig
from data_pipeline.sampling.plan import Plan
from data_pipeline.shards import writer
from data_pipeline.shards.local import CHUNK, Array, Extent, ShardError, ShardFiles

NEVER = np.iinfo(np.int64).max


def next_use(plan: Plan, epoch: int, window: int) -> Array:
    """(S,) windows from `window` of `epoch` on until each shard is needed, as far as the end of the next epoch."""
    use_S = np.full(len(plan.catalogue.shards), NEVER, np.int64)
    before = 0
    for number in (epoch, epoch + 1):
        layout = plan.layout(number)
        ends = layout.window_W1[1:]
        window_U = np.searchsorted(ends, np.arange(len(layout.shard_U)), side="right") + before - window
        ahead = window_U >= 0
        np.minimum.at(use_S, layout.shard_U[ahead], window_U[ahead])
        before += len(ends)
    return use_S


def to_evict(sizes: Mapping[int, int], use_S: Array, limit: int, incoming: int) -> list[int]:
    """Which cached shards must go so that `incoming` bytes fit below `limit`: those needed last (Belady 1966).

    No shard of the present window goes: a window fits, as `CachedShards.know` has checked.
    """
    total, gone = sum(sizes.values()) + incoming, []
    for number in sorted(sizes, key=lambda n: (-int(use_S[n]), n)):
        if total <= limit or use_S[number] == 0:
            break
        gone.append(number)
        total -= sizes[number]
    return gone


class RemoteShards(ShardFiles):
    """Reads the bytes of each sample by range requests, those of a micro-batch at the same time."""

    def __init__(self, root: str, records: Sequence[writer.DoneRecord], keep: int, verify: bool) -> None:
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
        return self._store.exists(writer.index_name(self.records[number].shard))

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
        return io.BytesIO(self._store.read(writer.index_name(self.records[number].shard)))


class CachedShards(RemoteShards):
    """Whole copies of remote shards in a local folder that all processes of a machine share.

    A thread fetches the shards of the present and the next window. What must make room is what the plan needs last.
    """

    def __init__(
        self, root: str, records: Sequence[writer.DoneRecord], keep: int, verify: bool, folder: Path, limit: int
    ) -> None:
        super().__init__(root, records, keep, verify=False)
        self._verify_copy = verify
        self.folder, self.limit = folder / hashlib.sha256(root.encode()).hexdigest()[:12], limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plan: Plan | None = None
        self._numbers = {self._copy(number).name: number for number in range(len(records))}
        self._use_S = np.zeros(len(records), np.int64)
        self._ahead: tuple[int, int] | None = None
        self._wake = threading.Event()

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        return [self._read_one(extent) for extent in wanted]

    def know(self, plan: Plan) -> None:
        """Raises ConfigError if not even one window of the plan fits."""
        self.plan, layout = plan, plan.layout(0)
        sizes_S = np.array([record.bytes for record in self.records])
        windows = zip(layout.window_W1[:-1], layout.window_W1[1:], strict=True)
        most = max(int(sizes_S[np.unique(layout.shard_U[a:b])].sum()) for a, b in windows)
        if self.limit < most:
            raise ConfigError(
                f"data.cache_gigabytes={self.limit / 1e9:g} is less than the {most / 1e9:.3g} GB of shards that are "
                "mixed at a time; raise it (twice that also holds what comes next), lower data.shuffle_window, or set "
                "data.cache_gigabytes=0 to read single segments from the remote"
            )

    def look_ahead(self, epoch: int, step: int) -> None:
        """Called with each request; starts to fetch when a new window begins."""
        assert self.plan is not None
        window = int(self.plan.layout(epoch).step_W1.searchsorted(step, side="right")) - 1
        if (epoch, window) == self._ahead:
            return
        first, self._ahead = self._ahead is None, (epoch, window)
        self._use_S = next_use(self.plan, epoch, window)
        for number in [number for number in self._files if self._use_S[number] > 0]:
            os.close(self._files.pop(number))  # an open file keeps its room on the disk
        self._wake.set()
        if first:
            threading.Thread(target=self._fetch_ahead, name="auricle-cache", daemon=True).start()

    def _local_path(self, number: int) -> Path:
        return self._fetch(number, wait=True) or self._copy(number)

    def _copy(self, number: int) -> Path:
        record = self.records[number]
        return self.folder / f"{Path(record.shard).stem}-{record.sha256[:16]}.tar"

    def _fetch_ahead(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            use_S = self._use_S
            for number in np.argsort(use_S, kind="stable")[: int((use_S <= 1).sum())].tolist():
                if self._wake.is_set():
                    break
                cached = sum(size for other, size in self._sizes_here().items() if use_S[other] <= 1)
                if use_S[number] == 1 and cached + self.records[number].bytes > self.limit:
                    break  # the next window does not fit beside this one
                with contextlib.suppress(ShardError, OSError):
                    self._fetch(number, wait=False)

    def _fetch(self, number: int, wait: bool) -> Path | None:
        """The local copy of a shard; None if another process is fetching it and `wait` is not asked."""
        copy = self._copy(number)
        if copy.exists():
            return copy
        with _locked(copy.with_suffix(".lock"), wait) as mine:
            if not mine:
                return None
            if not copy.exists():
                self._make_room(number)
                self._download(number, copy)
        return copy

    def _make_room(self, number: int) -> None:
        with _locked(self.folder / "evict.lock", wait=True):
            for other in to_evict(self._sizes_here(), self._use_S, self.limit, self.records[number].bytes):
                self._copy(other).unlink(missing_ok=True)

    def _sizes_here(self) -> dict[int, int]:
        sizes = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name in self._numbers:
                    with contextlib.suppress(FileNotFoundError):
                        sizes[self._numbers[entry.name]] = entry.stat().st_size
        return sizes

    def _download(self, number: int, copy: Path) -> None:
        record, part, digest = self.records[number], copy.with_suffix(f".{os.getpid()}.part"), hashlib.sha256()
        try:
            with self._store.fs.open(self._store.path(record.shard), "rb") as source, part.open("wb") as target:
                while data := source.read(CHUNK):
                    digest.update(data)
                    target.write(data)
            if self._verify_copy and digest.hexdigest() != record.sha256:
                raise self._mark(number, "was altered: its sha256 is not the recorded one")
            if part.stat().st_size != record.bytes:
                raise self._mark(number, f"has {part.stat().st_size} bytes; its record says {record.bytes}")
            part.replace(copy)
        except OSError as error:
            raise self._mark(number, f"cannot be fetched ({type(error).__name__}: {error})") from None
        finally:
            part.unlink(missing_ok=True)


def open_files(config: ReaderConfig, records: Sequence[writer.DoneRecord]) -> ShardFiles:
    """The right way to read `config.shards`. Raises ConfigError for settings that contradict each other."""
    keep = 2 * config.shuffle_window
    if not is_url(config.shards):
        return ShardFiles(FileStore(config.shards).root, records, keep, config.verify)
    if config.cache_gigabytes:
        folder = Path(config.cache or Path(tempfile.gettempdir()) / f"auricle-{os.getuid()}").expanduser()
        limit = int(config.cache_gigabytes * 1e9)
        return CachedShards(config.shards, records, keep, config.verify, folder, limit)
    if config.verify:
        raise ConfigError(
            "data.verify=true needs whole shards, but data.cache_gigabytes=0 reads only ranges of remote ones; "
            "set data.cache_gigabytes to the room for local copies"
        )
    return RemoteShards(config.shards, records, keep, verify=False)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock between processes; False if it is taken and `wait` is not asked. The kernel frees it at death."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
