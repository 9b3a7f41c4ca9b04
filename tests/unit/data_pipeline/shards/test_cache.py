"""The cache of remote shards: copies are verified like the originals, and links are refused."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.core.retries import StorageWriteError
from data_pipeline.shards import cache
from data_pipeline.shards.cache import CachedShards
from data_pipeline.shards.local import Extent, ShardSet
from data_pipeline.shards.records import done_records
from tests.support.tiny_shards import sounds, write_shards

EXTENT = Extent(0, 0, 2_048)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    folder = write_shards(tmp_path / "set", [sounds([0.3, 0.4])])
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/cached", recursive=True)
    yield "memory://cached"
    memory.rm("/cached", recursive=True)


def opened(remote: str, folder: Path) -> CachedShards:
    """Opens the shards as a newly started process."""
    return CachedShards(ShardSet(done_records(remote), 4, False, 0.0), folder, limit=10**8)


def read(remote: str, folder: Path) -> object:
    return opened(remote, folder).read([EXTENT])[0]


def the_copy(folder: Path) -> Path:
    (copy,) = folder.rglob("*.tar")
    return copy


def flip(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[700] ^= 0xFF
    copy.write_bytes(content)


def cut(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:1_000])


def link(copy: Path) -> None:
    copy.rename(copy.with_suffix(".moved"))
    copy.symlink_to(copy.with_suffix(".moved"))


@pytest.mark.parametrize("alter", [flip, cut, link], ids=lambda alter: alter.__name__)
def test_a_copy_is_verified_like_the_original(remote: str, tmp_path: Path, alter: object) -> None:
    folder = tmp_path / "cache"
    original = (tmp_path / "set" / "shard-0000.tar").read_bytes()
    assert read(remote, folder) == original[:2_048]
    alter(the_copy(folder))  # type: ignore[operator]
    assert read(remote, folder) == original[:2_048]
    assert the_copy(folder).read_bytes() == original
    assert not the_copy(folder).is_symlink()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_in_place_of_a_lock_is_refused(remote: str, tmp_path: Path, dangling: bool) -> None:
    target = tmp_path / "important"
    read(remote, tmp_path / "cache")
    copy = the_copy(tmp_path / "cache")
    copy.unlink()
    lock = copy.with_suffix(".lock")
    lock.unlink(missing_ok=True)
    shards = opened(remote, tmp_path / "cache")
    if not dangling:
        target.write_text("kept")
    lock.symlink_to(target)
    with pytest.raises(StorageWriteError, match=r"\.lock: is a symbolic link.*remove it"):
        shards.read([EXTENT])
    assert not shards.bad, "the shard must not be marked as bad"
    assert target.exists() != dangling
    assert dangling or target.read_text() == "kept"


def test_a_full_disk_of_the_cache_is_not_a_bad_shard(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, real = opened(remote, tmp_path / "cache"), Path.open

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, mode: str = "r", **more: object) -> object:
        file = real(path, mode, **more)  # type: ignore[call-overload]
        return Full(file) if path.suffix == ".part" else file

    monkeypatch.setattr(cache.Path, "open", full)
    with pytest.raises(StorageWriteError, match=r"\.part: cannot be written \(No space left on device\)"):
        shards.read([EXTENT])
    assert not shards.bad
