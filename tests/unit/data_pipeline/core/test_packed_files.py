"""Copies of many small files in one file count only as long as they are those of the files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.core import packed_files
from data_pipeline.core.packed_files import pack_name, read_folder, write_pack
from data_pipeline.core.storage import FileStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    """Returns a data set with a packed folder of 20 files, read 3 at a time."""
    monkeypatch.setattr(packed_files, "FEWEST", 5)
    monkeypatch.setattr(packed_files, "AT_A_TIME", 3)
    store = FileStore(str(tmp_path))
    for number in range(20):
        store.replace(f"_done/{number:02}.json", b"%d" % number)
    store.replace("_done/other", b"")
    write_pack(store, "_done", ".json")
    return store


def contents(store: FileStore) -> dict[str, bytes]:
    return dict(read_folder(store, "_done", ".json"))


def expected(**more: bytes) -> dict[str, bytes]:
    return {f"{number:02}.json": b"%d" % number for number in range(20)} | {f"{k[1:]}.json": v for k, v in more.items()}


def test_files_with_copies_are_not_read(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileStore, "read_several", lambda _, names: pytest.fail(f"{names}") if names else [])
    assert contents(store) == expected()
    assert list(contents(store)) == sorted(expected())


def test_changed_new_and_removed_files_are_seen(store: FileStore) -> None:
    store.remove("_done/03.json")
    for name, content in (("07", b"x"), ("00a", b"new"), ("99", b"last")):  # of the same size, between, and behind
        store.replace(f"_done/{name}.json", content)
    kept = expected(_07=b"x", _00a=b"new", _99=b"last")
    del kept["03.json"]
    assert contents(store) == kept
    write_pack(store, "_done", ".json")
    assert contents(store) == kept


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_pack_is_not_used(store: FileStore, damage: str) -> None:
    pack = Path(store.path(pack_name("_done")))
    content = pack.read_bytes()
    pack.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"PAR1" * 50)
    if damage == "missing":
        pack.unlink()
    assert contents(store) == expected()
    write_pack(store, "_done", ".json")
    assert pack.stat().st_size == len(content)


def test_an_unchanged_pack_is_not_written_again(store: FileStore) -> None:
    pack = Path(store.path(pack_name("_done")))
    os.utime(pack, (1, 1))
    write_pack(store, "_done", ".json")
    assert pack.stat().st_mtime == 1


def test_small_folders_have_no_pack(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.replace("_done/a.json", b"{}")
    write_pack(store, "_done", ".json")
    assert not store.exists("_packs")
    assert contents(store) == {"a.json": b"{}"}
    assert list(read_folder(store, "none", ".json")) == []
