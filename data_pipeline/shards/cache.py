"""Local copies of remote shards, evicted by next use, downloaded once per machine."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import random
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.retries import StorageWriteError, retry, write_errors
from data_pipeline.core.schema import ConfigError
from data_pipeline.shards.local import CHUNK, Array, Extent, ReadSchedule, ShardError, ShardSet
from data_pipeline.shards.remote import RemoteShards


def to_evict(sizes: Mapping[int, int], use_S: Array, limit: int, incoming: int) -> list[int]:
    """Returns the cached shards to evict so that `incoming` bytes fit below `limit`: those needed last (Belady 1966).

    Shards of the current window are kept; `CachedShards.follow` has checked that a window fits.

    Args:
        sizes: bytes of the cached shards by number.
        use_S: windows until each shard is read next.
        limit: capacity of the cache in bytes.
        incoming: bytes of the shard to fetch.
    """
    total, evicted = sum(sizes.values()) + incoming, []
    for number in sorted(sizes, key=lambda n: (-int(use_S[n]), n)):
        if total <= limit or use_S[number] == 0:
            break
        evicted.append(number)
        total -= sizes[number]
    return evicted


class CachedShards(RemoteShards):
    """Whole copies of remote shards in a local folder that all processes of a machine share.

    A thread fetches the shards of the current and the next window. Shards that the plan needs last are evicted first.
    The sha256 of every download is verified, and that of an existing copy at its first use.

    Args:
        shards: the shards to read.
        folder: local folder of the copies.
        limit: maximum total size of the copies in bytes.
    """

    def __init__(self, shards: ShardSet, folder: Path, limit: int) -> None:
        super().__init__(dataclasses.replace(shards, verify=False))
        self.folder, self.limit = folder / hashlib.sha256("\n".join(shards.tar_roots).encode()).hexdigest()[:12], limit
        with write_errors(str(self.folder)):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._schedule: ReadSchedule | None = None
        self._numbers = {self._copy(number).name: number for number in range(len(self.records))}
        self._use_S = np.zeros(len(self.records), np.int64)
        self._verified: set[int] = set()
        self._ahead: tuple[int, int] | None = None
        self._wake = threading.Event()

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        return [self._read_one(extent) for extent in wanted]

    def follow(self, schedule: ReadSchedule) -> None:
        """Sets the order of reads. Raises ConfigError if the cache is too small for one window."""
        self._schedule = schedule
        sizes_S = np.array([record.bytes for record in self.records])
        most = max(int(sizes_S[shards].sum()) for shards in schedule.windows(0))
        if self.limit < most:
            raise ConfigError(
                f"data.cache_gigabytes={self.limit / 1e9:g} is less than the {most / 1e9:.3g} GB of shards that are "
                "mixed at a time; raise it (twice that also holds the next window), lower data.shuffle_window, or set "
                "data.cache_gigabytes=0 to read single segments from the remote"
            )

    def look_ahead(self, epoch: int, step: int) -> None:
        """Starts fetching at the beginning of a window; called with each request."""
        assert self._schedule is not None
        window = self._schedule.window_of(epoch, step)
        if (epoch, window) == self._ahead:
            return
        first, self._ahead = self._ahead is None, (epoch, window)
        self._use_S = self._schedule.next_use(epoch, window)
        self._files.evict(lambda number: bool(self._use_S[number] > 0))  # an open file keeps its space on the disk
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
                    break  # both windows do not fit
                with contextlib.suppress(ShardError, OSError):
                    self._fetch(number, wait=False)

    def _fetch(self, number: int, wait: bool) -> Path | None:
        """Returns the path of the local copy; None if another process is fetching it and `wait` is False."""
        copy = self._copy(number)
        if number in self._verified and copy.exists():
            return copy
        with _locked(copy.with_suffix(".lock"), wait) as mine:
            if not mine:
                return None
            if not self._is_whole(number, copy):
                copy.unlink(missing_ok=True)
                self._make_space(number)
                self._download(number, copy)
            self._verified.add(number)
        return copy

    def _is_whole(self, number: int, copy: Path) -> bool:
        """Returns whether a copy exists and matches the record."""
        record = self.records[number]
        try:
            status = copy.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == record.bytes and sha256_of(copy) == record.sha256

    def _make_space(self, number: int) -> None:
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
        record, part = self.records[number], copy.with_suffix(f".{os.getpid()}.{random.getrandbits(32):08x}.part")

        store = self._store(record.tar_root)

        def fetch() -> tuple[int, str]:
            size, digest = 0, hashlib.sha256()
            with store.fs.open(store.path(record.shard), "rb") as source, part.open("wb") as target:
                while data := source.read(CHUNK):
                    digest.update(data)
                    size += len(data)
                    with write_errors(str(part)):
                        target.write(data)
            return size, digest.hexdigest()

        try:
            size, sha256 = retry(fetch, f"{record.tar_root}/{record.shard}", self.shards.patience)
            if size != record.bytes:
                raise self.mark_bad(number, f"has {size} bytes; its record says {record.bytes}")
            if sha256 != record.sha256:
                raise self.mark_bad(number, "checksum mismatch: its sha256 is not the recorded one")
            part.replace(copy)
        except FileNotFoundError:
            raise self.mark_bad(number, "is missing") from None
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds an inter-process lock in the block; yields False if it is taken and `wait` is False. Ends with its process.

    Raises:
        StorageWriteError: the lock file cannot be created, or a link is in its place.
    """
    if path.is_symlink():  # never followed when opened; this error names the remedy
        raise StorageWriteError(str(path), "is a symbolic link, which the cache does not follow; remove it")
    with write_errors(str(path)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
