"""Shards are deterministic, readable by other tools, claimed once, and never execute code."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import webdataset

from data_pipeline.audio import codecs
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import Segment
from data_pipeline.shards import writer as shards
from data_pipeline.shards.records import INDEX_SCHEMA, DoneRecord, done_records, index_name, read_index, refuse_code
from tests.support.sounds import contents, sound

EMPTY = DoneRecord(unit="unit", shard="", sha256="", bytes=0, index_sha256="", segments=0, samples=0)


def segment(number: int, text: str = "") -> Segment:
    return Segment(f"clip-{number}", "clip.wav", number * 16_000, 16_000, 16_000, "corpus", "ann", "en", text)


def pcm(number: int) -> np.ndarray:
    return codecs.to_int16(sound(f"clip {number}", 1.0))


def write(root: Path, numbers: list[int], codec: str = "flac") -> DoneRecord:
    store = FileStore(str(root))
    with store.scratch() as folder:
        writer = shards.ShardWriter(folder)
        for number in numbers:
            encoded = codecs.encode(pcm(number), 16_000, codec)
            writer.add(segment(number, "grüß dich"), codec, encoded, 16_000, level_dbfs=-20.5)
        return shards.commit(store, writer, EMPTY)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", [0, 1, 2]) == write(tmp_path / "b", [0, 1, 2])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tar_lists_and_extracts_a_shard(tmp_path: Path) -> None:
    record = write(tmp_path / "set", [0, 1])
    tar = tmp_path / "set" / record.shard
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["clip-0.flac", "clip-0.json", "clip-1.flac", "clip-1.json"]
    assert not listed.stderr
    subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True)
    wave, rate = soundfile.read(tmp_path / "clip-1.flac", dtype="int16")
    assert rate == 16_000
    np.testing.assert_array_equal(wave, pcm(1))


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    record = write(tmp_path, [0, 1, 2])
    samples = list(webdataset.WebDataset(str(tmp_path / record.shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["clip-0", "clip-1", "clip-2"]
    wave, _ = soundfile.read(io.BytesIO(samples[2]["flac"]), dtype="int16")
    np.testing.assert_array_equal(wave, pcm(2))
    said = json.loads(samples[2]["json"])
    assert (said["speaker"], said["start"], said["n_samples"], said["text"]) == ("ann", 32_000, 16_000, "grüß dich")


@pytest.mark.parametrize("codec", ["flac", "wav", "opus"])
def test_members_equal_those_written_by_webdataset(tmp_path: Path, codec: str) -> None:
    """Compares names, sizes, types and contents; our samples start with the audio, webdataset sorts members by name."""
    record = write(tmp_path, [0, 1, 2], codec)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0, user="", group="") as writer:
        for number in (0, 1, 2):
            about = segment(number, "grüß dich")
            document = shards.sample_json(about, 16_000, {"level_dbfs": -20.5})
            writer.write({"__key__": about.key, codec: codecs.encode(pcm(number), 16_000, codec), "json": document})

    def members(path: Path) -> list[tuple[str, int, bytes, bytes | None]]:
        with tarfile.open(path) as tar:
            return [(m.name, m.size, m.type, f.read() if (f := tar.extractfile(m)) else None) for m in tar]

    ours, theirs = members(tmp_path / record.shard), members(tmp_path / "theirs.tar")
    assert [name for name, *_ in ours] == [f"clip-{n}.{suffix}" for n in range(3) for suffix in (codec, "json")]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("codec", ["flac", "wav", "opus"])
def test_index_offsets_point_to_the_audio_payload(tmp_path: Path, codec: str) -> None:
    record = write(tmp_path, [0, 1, 2], codec)
    tar = (tmp_path / record.shard).read_bytes()
    offsets = np.frombuffer((tmp_path / (record.shard + ".idx")).read_bytes(), "<u8")
    rows = read_index(str(tmp_path), record).to_pylist()
    assert [row["offset"] for row in rows] == offsets[:-1].tolist()
    assert offsets[-1] == rows[-1]["offset"] + rows[-1]["size"]
    assert tar[int(offsets[-1]) :] == bytes(1024)
    row = rows[1]
    payload = tar[row["payload_offset"] : row["payload_offset"] + row["payload_size"]]
    assert payload == codecs.encode(pcm(1), 16_000, codec)
    assert (row["key"], row["n_samples"], row["start"], row["suffix"]) == ("clip-1", 16_000, 16_000, codec)


def test_rollback_leaves_no_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", [0, 2])
    store = FileStore(str(tmp_path / "rolled"))
    with store.scratch() as folder:
        writer = shards.ShardWriter(folder)
        for number in (0, 1, 2):
            mark = writer.mark()
            encoded = codecs.encode(pcm(number), 16_000, "flac")
            writer.add(segment(number, "grüß dich"), "flac", encoded, 16_000, level_dbfs=-20.5)
            if number == 1:
                writer.rollback(mark)
        assert shards.commit(store, writer, EMPTY) == plain
    assert contents(tmp_path / "plain") == contents(tmp_path / "rolled")


def test_the_first_record_wins_and_the_second_writer_cleans_up(tmp_path: Path) -> None:
    first = write(tmp_path, [0])
    before = contents(tmp_path)
    assert write(tmp_path, [1]) == first
    assert contents(tmp_path) == before


def test_duplicate_keys_and_keys_with_dots_are_refused(tmp_path: Path) -> None:
    writer = shards.ShardWriter(tmp_path)
    writer.add(segment(0), "flac", b"x", 1)
    with pytest.raises(ValueError, match="already"):
        writer.add(segment(0), "flac", b"x", 1)
    with pytest.raises(ValueError, match="dots"):
        writer.add(Segment("a.b", "f", 0, 1, 16_000, "c"), "flac", b"x", 1)


def test_folders_without_finished_shards_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auricle preprocess"):
        done_records(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is empty"):
        done_records(str(tmp_path))
    (tmp_path / "old.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="1 tars but no _done"):
        done_records(str(tmp_path))
    (tmp_path / "_done").mkdir()
    (tmp_path / "_done" / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not a record"):
        done_records(str(tmp_path))


def test_truncated_and_modified_files_are_reported(tmp_path: Path) -> None:
    record = write(tmp_path, [0, 1])
    tar = tmp_path / record.shard
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-600])
    with pytest.raises(ValueError, match="bytes instead of"):
        read_index(str(tmp_path), record)
    tar.write_bytes(whole)
    index = tmp_path / index_name(record.shard)
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256 differs"):
        read_index(str(tmp_path), record)
    index.unlink()
    with pytest.raises(ValueError, match="missing"):
        read_index(str(tmp_path), record)


@pytest.mark.parametrize("name", ["a.pyd", "a.pickle", "a.PTH", "a.flac.pkl"])
def test_pickle_members_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unpickled"):
        refuse_code(name, "x.tar")
    refuse_code("a.flac", "x.tar")


def test_tar_headers_and_index_equal_those_of_tarfile_and_pyarrow(tmp_path: Path) -> None:
    for name, size in (("a.flac", 0), ("x" * 95 + ".flac", 123_456_789)):
        info = tarfile.TarInfo(name)
        info.size = size
        assert shards.tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
    record = write(tmp_path, [0, 1, 2])
    table = read_index(str(tmp_path), record)
    table.validate(full=True)
    assert table["snr_db"].null_count == 3
    assert table.equals(pa.Table.from_pylist(table.to_pylist(), schema=INDEX_SCHEMA))
