"""Damaged or hostile records, index rows and JSON: the shard is named, and is skipped or an error."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.core import storage
from data_pipeline.core.retries import StorageWriteError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, private_folder
from data_pipeline.labels.kmeans import shard_waves
from data_pipeline.loader.reader import open_reader
from data_pipeline.preprocess import verify as verifying
from data_pipeline.preprocess.verify import verify
from data_pipeline.sampling import catalog
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards import local, places, records
from data_pipeline.shards.index_rows import MOST_NAMES
from data_pipeline.shards.local import ShardError
from data_pipeline.shards.records import DoneRecord, done_records, read_index
from tests.support.tiny_shards import sounds, write_shards

BATCH: dict[str, Any] = {"batch_seconds": 6.0, "micro_batches": 2, "min_seconds": 0.1, "max_seconds": 1.0}
BAD = "shard-0001"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    everything = sounds([0.5 + i % 5 / 10 for i in range(60)])
    return write_shards(tmp_path / "set", [everything[i::3] for i in range(3)])


def change_record(root: Path, **fields: Any) -> None:
    path = root / "_done" / f"{BAD}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_index(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / f"{BAD}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    change_record(root, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def column(name: str, values: list[Any] | None) -> Callable[[pa.Table], pa.Table]:
    """Returns a change that replaces the first values of a column, or drops the column."""

    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        if values is None:
            return table.remove_column(at)
        return table.set_column(at, name, pa.array([*values, *table.column(name).to_pylist()[len(values) :]]))

    return change


def keys_of(root: Path, **values: Any) -> tuple[set[str], int]:
    """Returns the keys of one epoch and the number of skipped segments."""
    reader = open_reader(DataConfig(shards=str(root), workers=0, **BATCH, **values), 0, 0, 1)
    try:
        steps = list(itertools.islice(reader.steps(), reader.plan.layout(0).steps))
    finally:
        reader.close()
    return {key for step in steps for batch in step.batches for key in batch.keys}, sum(step.skipped for step in steps)


HOSTILE_ROWS = {
    "n_samples 2**33": column("n_samples", [2**33]),
    "n_samples 2**32 + 8000, which wraps to 8000": column("n_samples", [2**32 + 8000]),
    "n_samples negative": column("n_samples", [-5]),
    "n_samples 0": column("n_samples", [0]),
    "n_samples null": column("n_samples", [None]),
    "n_samples missing": column("n_samples", None),
    "n_samples text": lambda table: column("n_samples", ["1"] * len(table))(table),
    "payload_size 2**40": column("payload_size", [2**40]),
    "payload_size negative": column("payload_size", [-1]),
    "payload_offset 2**62": column("payload_offset", [2**62]),
    "payload_offset before the sample": column("payload_offset", [10**6, 0]),
    "offset null": column("offset", [None]),
    "offset between blocks": column("offset", [7]),
    "size 2**63 - 1": column("size", [2**63 - 1]),
    "size missing": column("size", None),
    "key null": column("key", [None]),
    "key twice": lambda table: column("key", [table["key"][1].as_py()])(table),
    "suffix missing": column("suffix", None),
    "corpus missing": column("corpus", None),
    "corpus a number": lambda table: column("corpus", list(range(len(table))))(table),
    "rows missing": lambda table: table.slice(2),
    "rows twice": lambda table: pa.concat_tables([table, table]),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_invalid_index_rows_affect_their_shard_only(root: Path, name: str) -> None:
    whole, _ = keys_of(root)
    change_index(root, HOSTILE_ROWS[name])
    with pytest.raises(ValueError, match=rf"{BAD}\.tar: its index cannot be used") as refused:
        keys_of(root)
    assert isinstance(refused.value, ShardError)
    kept, _ = keys_of(root, on_bad_shard="skip")
    assert whole - kept == {f"a-{i:04d}" for i in range(1, 60, 3)}
    record = next(record for record in done_records(str(root)) if record.unit == BAD)
    if not name.startswith("rows"):
        with pytest.raises(ValueError, match=BAD):
            read_index(str(root), record)


@pytest.mark.parametrize(
    "names", [{"corpus": "http://host/{}.mp3"}, {"language": "l{}"}, {"corpus": "c{}", "language": "l{}"}]
)
@pytest.mark.parametrize("rows", [MOST_NAMES + 1, 70_000])
def test_too_many_corpora_or_languages_affect_their_shard_only(root: Path, names: dict[str, str], rows: int) -> None:
    """As after indexing tars whose samples name a URL each as their corpus."""
    columns: dict[str, Any] = {name: ["x"] * rows for name in ("speaker", "file_id", "corpus", "language")}
    columns |= {name: [text.format(row) for row in range(rows)] for name, text in names.items()}
    columns |= {"key": [f"k{row}" for row in range(rows)], "suffix": ["flac"] * rows, "n_samples": [8000] * rows}
    columns |= {"offset": np.arange(rows) * 1024, "payload_offset": np.arange(rows) * 1024 + 512}
    columns |= {"size": [1024] * rows, "payload_size": [100] * rows, "start": [0] * rows}
    os.truncate(root / f"{BAD}.tar", rows * 1024)
    change_index(root, lambda table: pa.table(columns))
    change_record(root, bytes=rows * 1024, segments=rows, samples=8000 * rows)
    with pytest.raises(ShardError, match=rf"{BAD}\.tar: .*column {min(names)} has {rows:,} names, more than 4,096"):
        keys_of(root)
    assert len(keys_of(root, on_bad_shard="skip")[0]) == 40


def test_the_shard_that_brings_too_many_groups_in_all_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MOST_GROUPS", 3)
    change_index(root, column("corpus", ["b", "c", "d", "e"]))
    with pytest.raises(ShardError, match=rf"{BAD}\.tar: with its 5 corpora and languages the data set has more than 3"):
        keys_of(root)
    assert len(keys_of(root, on_bad_shard="skip")[0]) == 40
    change_index(root, column("corpus", ["b", "c", "b", "c"]))
    assert len(keys_of(root)[0]) == 60
    for kind in (pa.null(), pa.string(), pa.large_string()):
        nulls = pa.nulls(20, kind)
        change_index(
            root, lambda table, nulls=nulls: table.set_column(table.column_names.index("corpus"), "corpus", nulls)
        )
        assert len(keys_of(root)[0]) == 60


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"[]"])
def test_an_index_that_is_not_parquet_affects_its_shard_only(root: Path, content: bytes) -> None:
    (root / f"{BAD}.parquet").write_bytes(content)
    with pytest.raises(ShardError, match=BAD):
        keys_of(root)
    assert len(keys_of(root, on_bad_shard="skip")[0]) == 40


HOSTILE_JSON = {
    "list": b"[1, 2]",
    "null": b"null",
    "deeply nested": b'{"a": ' * 30_000 + b"1" + b"}" * 30_000,
    "labels a list": b'{"labels": ["mood"]}',
    "not UTF-8": b'{"mood": "\xff"}',
    "empty": b"",
}


def replace_json(root: Path, content: bytes | None) -> None:
    """Replaces the JSON of every sample of the bad shard, by content or by a link."""
    tar, offset = root / f"{BAD}.tar", 0
    rows = pq.read_table(root / f"{BAD}.parquet").to_pylist()
    data, out = tar.read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for row in rows:
            audio = data[row["payload_offset"] : row["payload_offset"] + row["payload_size"]]
            offset = new.offset
            info = tarfile.TarInfo(f"{row['key']}.flac")
            info.size = len(audio)
            new.addfile(info, io.BytesIO(audio))
            info = tarfile.TarInfo(f"{row['key']}.json")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            new.addfile(info, io.BytesIO(content or b""))
            row.update(offset=offset, size=new.offset - offset, payload_offset=offset + 512)
    tar.write_bytes(out.getvalue())
    change_index(root, lambda _: pa.Table.from_pylist(rows))
    change_record(root, bytes=len(out.getvalue()), sha256=hashlib.sha256(out.getvalue()).hexdigest())


@pytest.mark.parametrize("name", [*HOSTILE_JSON, "link"])
def test_samples_with_invalid_json_are_skipped_and_counted(root: Path, name: str) -> None:
    replace_json(root, HOSTILE_JSON.get(name))
    with pytest.raises(ShardError, match=rf"{BAD}\.tar: the JSON of sample"):
        keys_of(root, labels=("mood",))
    kept, skipped = keys_of(root, labels=("mood",), on_bad_shard="skip")
    assert len(kept) == 40
    assert skipped >= 20  # counted once in each pass over the data


@pytest.mark.parametrize(
    "fields",
    [
        {"unit": "../../../x/important"},
        {"unit": "shard-0002"},
        {"shard": "../shard-0002.tar"},
        {"shard": "/etc/passwd"},
        {"shard": "a\x00.tar"},
        {"shard": ".hidden.tar"},
        {"shard": ["x.tar"]},
        {"bytes": -1},
        {"bytes": 2**70},
        {"segments": 2**40},
        {"segments": True},
        {"samples": 1.5},
        {"sha256": None},
        {"flow": 7},
    ],
)
def test_records_with_unsafe_names_or_invalid_counts_are_refused(root: Path, fields: dict[str, Any]) -> None:
    change_record(root, **fields)
    for read in (done_records, keys_of):
        with pytest.raises(ValueError, match=rf"_done/{BAD}\.json") as refused:
            read(str(root))  # type: ignore[arg-type]
        assert not isinstance(refused.value, ConfigError)


def test_a_record_with_a_huge_segment_count_allocates_no_memory(root: Path) -> None:
    change_record(root, bytes=2**50, segments=2**39)
    kept, _ = keys_of(root, on_bad_shard="skip")
    assert len(kept) == 40


def test_two_records_of_one_shard_are_refused(root: Path) -> None:
    values = json.loads((root / "_done" / f"{BAD}.json").read_text())
    (root / "_done" / "again.json").write_text(json.dumps(values | {"unit": "again"}))
    with pytest.raises(ValueError, match=rf"again\.json and {BAD}\.json both name {BAD}\.tar"):
        done_records(str(root))


def test_a_record_without_a_location_keeps_the_checksum_of_earlier_versions(root: Path) -> None:
    record = done_records(str(root))[0]
    assert "location" not in json.loads(record.to_json())
    moved = DoneRecord.from_json(record.to_json(), f"{record.unit}.json")
    assert moved == record


@pytest.mark.parametrize(
    "location",
    [
        *("http://127.0.0.1:9/x", "s3://nobody/x", "sftp://host/x", "simplecache::http://127.0.0.1:9/x", "evilmod://x"),
        *(
            "/etc",
            "../../..",
            "/nonexistent/x",
            "~",
            " ",
            "file:///etc",
            "memory://x",
            "\0",
            "/etc\x1b]0;title",
            "x" * 9999,
        ),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_record_reads_no_other_place_by_itself(root: Path, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Spied(FileStore):
        def __init__(self, folder: str, *more: Any) -> None:
            opened.append(folder)
            super().__init__(folder, *more)

    for module in (local, records, verifying):
        monkeypatch.setattr(module, "FileStore", Spied)
    change_record(root, location=location)
    with pytest.raises(ValueError, match=rf"{BAD}\.tar: its record places its tar in .*set data\.tars") as refused:
        keys_of(root)
    assert str(refused.value).isprintable()
    assert len(keys_of(root, on_bad_shard="skip")[0]) == 40
    record = next(record for record in done_records(str(root)) if record.unit == BAD)
    assert (record.tar_root, record.location) == (str(root), location)
    for read in (lambda: read_index(str(root), record), lambda: list(shard_waves(record))):
        with pytest.raises(ValueError, match=rf"{BAD}\.tar: its record places"):
            read()
    assert any(BAD in name and "its record places" in fault for name, fault in verify(str(root)))
    assert opened
    assert all(folder.startswith(str(root)) for folder in opened)


def test_a_place_that_the_config_or_this_user_allows_is_read(root: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    (root / f"{BAD}.tar").rename(tars / f"{BAD}.tar")
    change_record(root, location=str(tars))
    assert len(keys_of(root, on_bad_shard="skip")[0]) == 40
    assert len(keys_of(root, tars=(str(tars),))[0]) == 60
    assert len(keys_of(root, tars=(f"{tars}/",))[0]) == 60
    tars.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"{BAD}\.tar: is missing"):
        keys_of(root, tars=(str(tars),))
    assert len(keys_of(root, tars=(str(tars),), on_bad_shard="skip")[0]) == 40
    (tmp_path / "gone").rename(tars)
    listed = Path(os.environ["XDG_STATE_HOME"]) / "auricle" / "indexed_tars.jsonl"
    listed.parent.mkdir(exist_ok=True)
    with listed.open("ab") as file:
        file.write(b'[1]\n\xff\n"torn')
    places.remember(str(tars))
    assert len(keys_of(root)[0]) == 60


def test_the_temporary_cache_is_private_to_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder().stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(StorageWriteError, match=str(folder)):
        private_folder()
    folder.unlink()
    folder.mkdir()
    someone_else = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: someone_else)
    other = tmp_path / f"auricle-{os.getuid()}"
    other.mkdir()
    with pytest.raises(StorageWriteError, match=r"belongs to user .* set data\.cache"):
        private_folder()


def test_scratch_folders_of_ended_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    with store.scratch("unit+") as mine:
        machine = mine.name.split("+")[1]
        ended = mine.with_name(f"unit+{machine}+{os.getpid()}+12345+abc")  # a reused process id
        elsewhere = mine.with_name(f"unit+{'0' * 12}+{os.getpid()}+12345+abc")
        expired = mine.with_name("unit+host+7+abc")  # the name format of earlier versions
        for folder in (ended, elsewhere, expired):
            folder.mkdir()
        os.utime(expired, (0, 0))
        assert store.sweep() == 2
        assert mine.is_dir()
        assert elsewhere.is_dir()
    assert not mine.exists()


def test_twins_with_equal_host_process_number_and_start_time_keep_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers on machines that were cloned: only the random id and its lease tell the processes apart."""
    store = FileStore(str(tmp_path))
    with store.scratch() as first:
        monkeypatch.setattr(storage, "process_id", lambda pid: "f" * 16)
        with store.scratch() as second:
            assert first.name.split("+")[:3] == second.name.split("+")[:3]
            assert store.sweep() == 0
            assert first.is_dir()
            assert second.is_dir()
            os.utime(first, (0, 0))
            os.utime(second, (0, 0))
            assert store.sweep() == 1, "the lease of the other one has ended; its own needs none"
            assert not first.exists()
            assert second.is_dir()


def test_without_an_identity_of_the_machine_leases_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox that hides the kernel's identity, equal host names must not make two machines one."""
    monkeypatch.setattr(storage, "BOOT_ID", tmp_path / "hidden")
    storage.machine_id.cache_clear()
    ours = storage.machine_id()
    storage.machine_id.cache_clear()
    theirs = storage.machine_id()
    storage.machine_id.cache_clear()
    assert ours != theirs
    monkeypatch.setattr(storage, "machine_id", lambda: ours)
    folder = tmp_path / ".tmp" / f"{theirs}+4000000+12345+{'0' * 16}+abc"
    folder.mkdir(parents=True)
    assert FileStore(str(tmp_path)).sweep() == 0
    os.utime(folder, (0, 0))
    assert FileStore(str(tmp_path)).sweep() == 1


def test_a_forked_process_has_its_own_id() -> None:
    assert storage.process_id(1) == storage.process_id(1) != storage.process_id(2)


def test_index_offsets_increase(root: Path) -> None:
    table = read_index(str(root), done_records(str(root))[0])
    assert np.all(np.diff(table["offset"].to_numpy()) > 0)
