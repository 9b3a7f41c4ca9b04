"""Corpus and shards on an S3 server: a separate process on the loopback interface, reached through s3fs."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from data_pipeline.core.packed_files import FEWEST, write_pack
from data_pipeline.core.storage import FileStore
from data_pipeline.preprocess.verify import verify
from data_pipeline.shards.records import DoneRecord, done_records, finished_units, read_index
from tests.support.corpora import preprocess_here
from tests.support.sounds import many, path_config, write_corpus

pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a server with a bucket "speech", configures fsspec for it by config file, and returns its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": url}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("speech")
        yield url
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_only_one_writer_obtains_a_claim(s3: str) -> None:
    store = FileStore("s3://speech/claims")
    assert store.create("_done/a.json", b"first")
    assert not store.create("_done/a.json", b"second")
    assert store.read("_done/a.json") == b"first"


def test_preprocessing_on_s3_gives_the_shards_of_local_disks(s3: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(12))
    (corpus / "broken.flac").write_bytes(b"fLaC" * 50)
    FileStore("s3://speech").fs.put(str(corpus), "speech/corpus", recursive=True)
    remote = {"out": "s3://speech/out", "corpus": {"name": "path", "path": "s3://speech/corpus"}}
    # uses its own Ray, whose workers inherit the server's address
    code = (
        "import json, sys\n"
        "from data_pipeline.preprocess.config import PreprocessConfig\n"
        "from data_pipeline.preprocess.job import preprocess\n"
        "from data_pipeline.core.schema import load\n"
        "summary = preprocess(load(PreprocessConfig, json.loads(sys.argv[1])), progress=False)\n"
        "print(json.dumps([summary.segments, summary.quarantined, summary.units_done]))\n"
    )
    values = {**remote, "shard_mb": 0.1, "ray": {"num_cpus": 2}}
    command = [sys.executable, "-c", code, json.dumps(values)]
    first = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    segments, quarantined, units = json.loads(first.stdout.splitlines()[-1])
    assert (segments, quarantined) == (12, 1)
    assert units > 1
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert json.loads(again.stdout.splitlines()[-1]) == [12, 1, 0]
    assert list(verify("s3://speech/out")) == []
    records = done_records("s3://speech/out")
    keys = {row["key"] for record in records for row in read_index("s3://speech/out", record).to_pylist()}
    assert len(keys) == 12
    preprocess_here(path_config(corpus, tmp_path / "out"))
    # contents are equal; only the grouping of files differs, because it depends on their modification times
    local = str(tmp_path / "out")
    assert keys == {row["key"] for record in done_records(local) for row in read_index(local, record).to_pylist()}


def test_records_on_s3_are_read_from_one_file(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore("s3://speech/many")
    records = [DoneRecord(f"{n:016x}", "", "", 0, "", 0, 0, files=n) for n in range(FEWEST)]
    store.fs.pipe({store.path(f"_done/{record.unit}.json"): record.to_json() for record in records})
    assert finished_units(store.root) == records
    write_pack(store, "_done", ".json")
    changed = dataclasses.replace(records[7], files=1_000)
    store.replace(f"_done/{changed.unit}.json", changed.to_json())
    requested: list[str] = []
    read_several = FileStore.read_several

    def counted(self: FileStore, names: Sequence[str]) -> list[bytes]:
        requested.extend(names)
        return read_several(self, names)

    monkeypatch.setattr(FileStore, "read_several", counted)
    assert finished_units(store.root) == [*records[:7], changed, *records[8:]]
    assert requested == [f"_done/{changed.unit}.json"]
