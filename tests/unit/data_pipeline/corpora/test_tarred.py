"""Corpora in tar files: WebDataset, Lhotse Shar and NeMo tarred; each audio member is a recording read in place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import AudioFile, Span
from data_pipeline.corpora.config import corpus_type
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import Discovered, stat
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.verify import verify
from data_pipeline.shards.records import done_records, read_index
from tests.support.corpora import preprocess_here
from tests.support.foreign_tars import encoded, wave, write_tar

RATE = 16_000


def find(name: str, path: Path, **values: Any) -> Discovered:
    return discover(load(corpus_type(name), {"name": name, "path": str(path), **values}))


def by_name(found: Discovered) -> dict[str, AudioFile]:
    return {file.file_id.partition("/")[2]: file for file in found.files}


def reasons(found: Discovered) -> dict[str, str]:
    return {reject.file_id: reject.reason for reject in found.rejects}


def test_webdataset_members_with_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [
        ("u1.wav", encoded(wave(1, rate=44_100), "wav", 44_100)),
        ("u1.json", b'{"transcript": "one", "speaker": 0, "lang": "de", "mood": "calm", "split": "dev"}'),
        ("talk.left.flac", encoded(wave(2))),
        ("talk.right.flac", encoded(np.stack([wave(3), wave(4)], 1))),
        ("talk.txt", b"both"),
        ("bad.flac", encoded(wave(5))), ("bad.json", b"[1]"),
        ("picture.jpg", b"x"),
    ])  # fmt: skip
    found = find("webdataset", tmp_path, language="en")
    files = by_name(found)
    assert list(files) == ["talk.left.flac", "talk.right.flac", "u1.wav"]
    one = files["u1.wav"]
    assert (one.text, one.speaker, one.language, one.split, one.labels) == ("one", "0", "de", "dev", {
        "transcript": "one", "lang": "de", "mood": "calm",
    })  # fmt: skip
    assert (files["talk.left.flac"].text, files["talk.left.flac"].language) == ("both", "en")
    assert reasons(found) == {"a.tar/bad.flac": "labels"}
    assert stat(one.path) == (one.size, one.mtime)
    assert [file.file_id for file in find("webdataset", tmp_path, splits=["dev"]).files] == ["a.tar/u1.wav"]


def test_webdataset_is_converted_to_shards(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_tar(corpus / "a.tar", [(f"u{i}.wav", encoded(wave(i, rate=8_000), "wav", 8_000)) for i in range(4)])
    config = load(PreprocessConfig, {
        "out": str(tmp_path / "out"), "corpus": {"name": "webdataset", "path": str(corpus)},
    })  # fmt: skip
    preprocess_here(config)
    [record] = done_records(str(tmp_path / "out"))
    rows = read_index(str(tmp_path / "out"), record).to_pylist()
    assert sorted(row["file_id"] for row in rows) == [f"a.tar/u{i}.wav" for i in range(4)]
    assert {row["n_samples"] for row in rows} == {11_200}
    assert list(verify(str(tmp_path / "out"))) == []


def test_shar_written_by_lhotse_is_read(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="needs lhotse")
    cuts = []
    for i in range(3):
        soundfile.write(tmp_path / f"r{i}.wav", wave(i, 2.0), RATE)
        recording = lhotse.Recording.from_file(tmp_path / f"r{i}.wav", recording_id=f"r{i}")
        spoken = [(0.0, 2.0)] if i < 2 else [(0.2, 0.5), (1.0, 0.75)]
        supervisions = [
            lhotse.SupervisionSegment(
                f"s{i}-{n}", f"r{i}", start, length, text=f"text {i} {n}", speaker=f"p{i}", language="fr"
            )
            for n, (start, length) in enumerate(spoken)
        ]
        cuts.append(lhotse.MonoCut(f"cut.{i}", 0, 2.0, 0, supervisions=supervisions, recording=recording))
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(str(tmp_path / "shar"), {"recording": "flac"}, shard_size=2)
    found = find("lhotse_shar", tmp_path / "shar")
    files = [file for file in found.files if file.text]
    assert [(file.text, file.speaker, file.language, file.seconds) for file in files] == [
        ("text 0 0", "p0", "fr", 2.0), ("text 1 0", "p1", "fr", 2.0),
    ]  # fmt: skip
    [many] = [file for file in found.files if file.spans]
    assert [(span.start, span.stop, span.text) for span in many.spans] == [
        (3_200, 11_200, "text 2 0"), (16_000, 28_000, "text 2 1"),
    ]  # fmt: skip
    assert found.rejects == []


def test_mismatched_shar_rows_and_members_are_rejects(tmp_path: Path) -> None:
    write_tar(tmp_path / "recording.000000.tar", [
        ("a.flac", encoded(wave(1, 1.0))), ("a.json", b"{}"), ("b.nodata", b""), ("b.nometa", b""),
        ("other.flac", encoded(wave(2))), ("d.flac", encoded(wave(3))), ("e.flac", encoded(wave(4))),
    ])  # fmt: skip
    bad = {"id": "d", "duration": 1.0, "supervisions": [{"start": "soon", "duration": 1.0}]}
    rows: Sequence[Any] = [{"id": "a", "duration": 1.0}, {"id": "b"}, {"id": "c"}, bad]
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    write_tar(tmp_path / "recording.000001.tar", [("x.flac", b"")])
    found = find("lhotse_shar", tmp_path)
    assert list(by_name(found)) == ["a.flac"]
    assert {name.rpartition("/")[2]: reason for name, reason in reasons(found).items()} == {
        "b.nodata": "missing", "other.flac": "mismatch", "d.flac": "span", "e.flac": "not_listed",
        "recording.000001.tar": "no_cuts",
    }  # fmt: skip


def test_nemo_rows_refer_to_members_and_spans(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "audio_0.tar", [("a.wav", encoded(wave(1, 3.0), "wav")), ("same.wav", encoded(wave(2), "wav"))]
    )
    write_tar(tmp_path / "audio_1.tar", [("same.wav", encoded(wave(3), "wav")), ("alone.wav", encoded(wave(4), "wav"))])
    rows = [
        {"audio_filepath": "a.wav", "duration": 1.0, "offset": 0.5, "text": "first", "shard_id": 0},
        {"audio_filepath": "a-sub1.wav", "duration": 1.0, "offset": 1.0, "text": "second\u2028line", "shard_id": 0},
        {"audio_filepath": "same.wav", "duration": 1.0, "text": "of one", "shard_id": 1, "lang": "es", "speaker": 0},
        {"audio_filepath": "nowhere.wav", "duration": 1.0, "text": "lost", "shard_id": 1},
        {"duration": 1.0},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "tarred_audio_manifest.json").write_text("\n".join([*lines, "{broken"]) + "\n", encoding="utf-8")
    found = find("nemo_tarred", tmp_path)
    files = {file.file_id: file for file in found.files}
    assert files["audio_0.tar/a.wav"].spans == (
        Span(8_000, 24_000, text="first", row=1), Span(16_000, 32_000, text="second\u2028line", row=2),
    )  # fmt: skip
    one = files["audio_1.tar/same.wav"]
    assert (one.text, one.language, one.speaker, one.spans) == ("of one", "es", "0", ())
    assert sorted((reject.row, reject.reason) for reject in found.rejects) == [
        (0, "not_listed"), (0, "not_listed"), (4, "missing"), (5, "row"), (6, "labels"),
    ]  # fmt: skip


def test_missing_tars_and_manifests_and_damaged_tars_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.tar files"):
        find("webdataset", tmp_path)
    write_tar(tmp_path / "a.tar", [("u.wav", encoded(wave(1), "wav"))])
    with pytest.raises(ConfigError, match=r"corpus\.manifest"):
        find("nemo_tarred", tmp_path)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2])
    assert reasons(find("webdataset", tmp_path)) == {"a.tar": "damaged_tar"}
