"""Tars of other tools are indexed unchanged, and then read, resumed and distributed over ranks like native shards."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Step
from data_pipeline.loader.reader import open_reader
from data_pipeline.preprocess.verify import verify
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards import indexing
from data_pipeline.shards.indexing import IndexConfig, IndexSummary, index_tars
from data_pipeline.shards.records import done_records, read_index
from launch.main import main
from tests.support.foreign_tars import encoded, wave, write_foreign, write_tar

BATCH: dict[str, Any] = {"batch_seconds": 6.0, "micro_batches": 2, "min_seconds": 0.1, "max_seconds": 1.0}


def index(root: Path, **values: Any) -> IndexSummary:
    return index_tars(IndexConfig(tars=str(root), workers=1, **values))


def steps_of(root: Path, count: int, rank: int = 0, world: int = 1, **values: Any) -> list[Step]:
    reader = open_reader(DataConfig(shards=str(root), workers=0, **BATCH, **values), 3, rank, world)
    try:
        return list(itertools.islice(reader.steps(), count))
    finally:
        reader.close()


def test_indexed_tars_are_read_and_resumed_on_any_ranks_like_native_shards(tmp_path: Path) -> None:
    root = write_foreign(tmp_path / "tars")
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    summary = index(root)
    assert (summary.tars, summary.segments, summary.rejects) == (3, 60, {})
    assert all((root / name).read_bytes() == content for name, content in before.items())
    labels = ("text", "speaker", "language", "mood", "corpus")
    whole = steps_of(root, 8, labels=labels)
    for step in whole:
        for batch in step.batches:
            for row, key in enumerate(batch.keys):
                n = int(key.removeprefix("utt"))
                assert tuple(batch.labels[name][row] for name in labels) == (
                    f"words {n}", str(n % 7), "de", "calm", "tars",
                )  # fmt: skip
                if n % 20 % 5 < 2:  # lossless
                    expected = wave(n)[: int(batch.lengths_B[row])] / np.float32(32768)
                    np.testing.assert_array_equal(batch.wave_BT[row, : len(expected)].numpy(), expected)
    ranks = [steps_of(root, 8, rank, 2) for rank in range(2)]
    for g, step in enumerate(whole):
        for j, batch in enumerate(step.batches):
            assert ranks[j][g].batches[0].keys == batch.keys
    reader = open_reader(DataConfig(shards=str(root), workers=0, **BATCH), 3, 0, 1)
    resumed = list(itertools.islice(reader.steps(whole[3].after), 2))
    reader.close()
    assert [step.batches[0].keys for step in resumed] == [step.batches[0].keys for step in whole[4:6]]


def test_an_index_in_another_folder_leaves_the_tar_folder_unchanged(tmp_path: Path) -> None:
    root, out = write_foreign(tmp_path / "tars", 2), tmp_path / "index"
    names = {path.name for path in root.iterdir()}
    index(root, index_out=str(out), corpus="mine", language="en")
    assert {path.name for path in root.iterdir()} == names
    in_place = tmp_path / "copy"
    shutil.copytree(root, in_place)
    index(in_place)
    one, other = (steps_of(folder, 4, labels=("corpus",)) for folder in (out, in_place))
    assert [s.batches[0].keys for s in one] == [s.batches[0].keys for s in other]
    assert set(one[0].batches[0].labels["corpus"]) == {"mine"}
    assert one[0].after.plan_hash == other[0].after.plan_hash  # depends on the content, not on its location


def test_keys_with_dots_folders_and_several_audio_members_are_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [
        ("talk.left.flac", encoded(wave(1), "flac")),
        ("talk.right.flac", encoded(wave(2), "flac")),
        ("talk.right.txt", b"of the right one"),
        ("talk.json", b'{"speaker": 0, "text": "of both"}'),
        ("dir/v1.2.wav", encoded(wave(3), "wav")),
        ("dir/v1.2.json", b'{"speaker": "b"}'),
        ("x" * 150 + ".flac", encoded(wave(4), "flac")),
        ("y.cls", b"7"),
    ])  # fmt: skip
    assert index(tmp_path).segments == 4
    record = done_records(str(tmp_path))[0]
    rows = {row["key"]: row for row in read_index(str(tmp_path), record).to_pylist()}
    assert list(rows) == ["talk.left", "talk.right", "dir/v1.2", "x" * 150]
    assert (rows["talk.left"]["speaker"], rows["talk.left"]["text"]) == ("0", "of both")
    assert rows["talk.right"]["text"] == "of the right one"
    assert rows["dir/v1.2"]["speaker"] == "b"
    data = (tmp_path / "a.tar").read_bytes()
    for key, number in (("talk.right", 2), ("dir/v1.2", 3), ("x" * 150, 4)):
        row = rows[key]
        content = data[row["payload_offset"] : row["payload_offset"] + row["payload_size"]]
        np.testing.assert_array_equal(soundfile.read(io.BytesIO(content), dtype="int16")[0], wave(number))


def test_invalid_members_are_rejects_and_change_no_other_sample(tmp_path: Path) -> None:
    good = encoded(wave(1), "flac")
    write_tar(tmp_path / "a.tar", [
        ("good1.flac", good),
        ("rate.wav", encoded(wave(2, rate=8000), "wav", 8000)),
        ("stereo.flac", encoded(np.stack([wave(3), wave(4)], axis=1), "flac")),
        ("cut.flac", good[: len(good) // 2]),
        ("noise.mp3", b"not audio" * 50),
        ("empty.wav", b""),
        ("list.flac", good), ("list.json", b"[1]"),
        ("deep.flac", good), ("deep.json", b"[" * 99_999),
        ("latin.flac", good), ("latin.txt", "grün".encode("latin-1")),
        ("huge.json", b" " * (2 << 20)),
        ("noending", b"x"),
        ("good1.wav", encoded(wave(5), "wav")),
        ("good2.flac", good), ("good2.json", json.dumps({"text": "so"}).encode()),
    ])  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    summary = index(tmp_path)
    assert summary.segments == 2
    rejects = [json.loads(line) for line in (tmp_path / "_rejects" / "a.jsonl").read_text().splitlines()]
    assert {row["file_id"]: row["reason"] for row in rejects} == {
        "rate.wav": "sample_rate", "stereo.flac": "channels", "cut.flac": "corrupt", "noise.mp3": "corrupt",
        "empty.wav": "corrupt", "list.flac": "labels", "deep.flac": "labels", "latin.flac": "labels",
        "huge.json": "too_large", "noending": "no_file", "good1.wav": "listed_twice", "link.flac": "no_file",
    }  # fmt: skip
    assert summary.rejects.total() == len(rejects)


def test_complete_samples_of_a_truncated_tar_are_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"u{i}.flac", encoded(wave(i), "flac")) for i in range(4)])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) * 6 // 10])
    summary = index(tmp_path)
    assert 1 <= summary.segments <= 3
    assert set(summary.rejects) == {"index/damaged_tar"}


def test_a_repeat_indexes_only_new_and_changed_tars(tmp_path: Path) -> None:
    root = write_foreign(tmp_path / "tars", 2, 5)
    index(root)
    write_tar(root / "part-000.tar", [("other.flac", encoded(wave(9), "flac"))])
    write_tar(root / "part-002.tar", [("more.flac", encoded(wave(10), "flac"))])
    again = index(root)
    assert (again.tars, again.already, again.segments) == (3, 1, 7)


def test_verify_reads_indexed_tars(tmp_path: Path) -> None:
    root, out = write_foreign(tmp_path / "tars", 2, 5), tmp_path / "index"
    index(root, index_out=str(out))
    index(root)
    assert list(verify(str(root))) == list(verify(str(out))) == []
    content = bytearray((root / "part-001.tar").read_bytes())
    content[2_000] ^= 0xFF
    (root / "part-001.tar").write_bytes(content)
    for folder in (root, out):
        assert any(name == "part-001.tar" and "checksum mismatch" in fault for name, fault in verify(str(folder)))


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    root = write_foreign(tmp_path / "tars", 1, 5)
    (root / "part-000.parquet").write_bytes(b"someone's")
    with pytest.raises(ConfigError, match="set index_out="):
        index(root)
    assert (root / "part-000.parquet").read_bytes() == b"someone's"
    with pytest.raises(ConfigError, match=r"holds no \.tar files"):
        index(tmp_path)


def test_the_command_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_foreign(tmp_path / "tars", 1, 5)
    assert main(["shards", "index", str(root), f"index_out={tmp_path / 'index'}", "workers=1"]) == 0
    assert "1 tars (0 indexed before), 5 segments" in capsys.readouterr().out
    assert main(["shards", "index", str(root), "indexout=x"]) == 2
    assert "did you mean index_out?" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["dataset", "language"])
def test_samples_that_name_a_corpus_each_are_counted_rejects(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "MOST_NAMES", 2)
    for name, values in (("a", "xyz"), ("b", "xyx")):
        write_tar(tmp_path / f"{name}.tar", [
            member
            for number, value in enumerate(values)
            for member in (
                (f"{number}.flac", encoded(wave(number))),
                (f"{number}.json", json.dumps({field: value}).encode()),
            )
        ])  # fmt: skip
    summary = index(tmp_path)
    reason = {"dataset": "many_corpora", "language": "many_languages"}[field]
    assert summary.rejects == {f"index/{reason}": 3}
    assert [record.unit for record in done_records(str(tmp_path))] == ["b"]
    rows = [json.loads(line) for line in (tmp_path / "_rejects" / "a.jsonl").read_text().splitlines()]
    assert [row["file_id"] for row in rows] == ["0.flac", "1.flac", "2.flac"]
    assert "rename the field" in rows[0]["error"]
