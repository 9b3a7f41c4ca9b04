"""Local cache of remote shards, with eviction by next use and one download per machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.core.schema import ConfigError
from data_pipeline.shards.local import CHUNK, Array, Extent, ReadSchedule, ShardError
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.remote import RemoteShards


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


class CachedShards(RemoteShards):
    """Whole copies of remote shards in a local folder that all processes of a machine share.

    A thread fetches the shards of the present and the next window. What must make room is what the plan needs last.
    """

    def __init__(
        self, root: str, records: Sequence[DoneRecord], keep: int, verify: bool, folder: Path, limit: int
    ) -> None:
        super().__init__(root, records, keep, verify=False)
        self._verify_copy = verify
        self.folder, self.limit = folder / hashlib.sha256(root.encode()).hexdigest()[:12], limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._schedule: ReadSchedule | None = None
        self._numbers = {self._copy(number).name: number for number in range(len(records))}
        self._use_S = np.zeros(len(records), np.int64)
        self._ahead: tuple[int, int] | None = None
        self._wake = threading.Event()

    def read(self, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        return [self._read_one(extent) for extent in wanted]

    def follow(self, schedule: ReadSchedule) -> None:
        """Raises ConfigError if not even one window of the schedule fits into the cache."""
        self._schedule = schedule
        sizes_S = np.array([record.bytes for record in self.records])
        most = max(int(sizes_S[shards].sum()) for shards in schedule.windows(0))
        if self.limit < most:
            raise ConfigError(
                f"data.cache_gigabytes={self.limit / 1e9:g} is less than the {most / 1e9:.3g} GB of shards that are "
                "mixed at a time; raise it (twice that also holds what comes next), lower data.shuffle_window, or set "
                "data.cache_gigabytes=0 to read single segments from the remote"
            )

    def look_ahead(self, epoch: int, step: int) -> None:
        """Called with each request; starts to fetch when a new window begins."""
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
