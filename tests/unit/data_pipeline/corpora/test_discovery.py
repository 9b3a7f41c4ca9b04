"""Discovery of a corpus's files."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora import discovery
from data_pipeline.corpora.config import ManifestCorpus, PathCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import Discovered
from tests.support.sounds import write_corpus


def reasons(found: Discovered) -> dict[str, str]:
    return {reject.file_id: reject.reason for reject in found.rejects}


def test_a_tree_with_unusual_names_links_and_loops_is_searched(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "my speech", {"a b/naïve 语音.wav": 0.1, "SHOUTING.WAV": 0.1, "x/y/z.flac": 0.1})
    (root / "notes.txt").write_text("no audio")
    (root / "x" / "loop").symlink_to(root)
    (root / "self.wav").symlink_to(root / "self.wav")
    (root / "gone.wav").symlink_to(root / "nothing")
    (root / "linked.flac").symlink_to(root / "x" / "y" / "z.flac")
    bad_name = os.fsencode(root) + b"/\xff\xfe.wav"
    os.link(os.fsencode(root / "SHOUTING.WAV"), bad_name)
    found = discover(PathCorpus(path=str(root)))
    assert [file.file_id for file in found.files] == sorted(
        ["SHOUTING.WAV", "a b/naïve 语音.wav", "linked.flac", "x/y/z.flac", "\\xff\\xfe.wav"]
    )
    assert {file.corpus for file in found.files} == {"my speech"}
    assert reasons(found) == {"self.wav": "broken_link", "gone.wav": "broken_link"}


def test_speaker_and_split_come_from_the_pattern(tmp_path: Path) -> None:
    root = write_corpus(tmp_path, {"train/ann/1.wav": 0.1, "test/bob/1.wav": 0.1, "other.wav": 0.1})
    pattern = "^(?P<split>[^/]+)/(?P<speaker>[^/]+)/"
    found = discover(PathCorpus(path=str(root), pattern=pattern, language="en", splits=("train",)))
    assert [(file.speaker, file.split, file.language) for file in found.files] == [("ann", "train", "en")]
    with pytest.raises(ConfigError, match="regular expression"):
        discover(PathCorpus(path=str(root), pattern="("))


def test_empty_and_missing_corpora_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        discover(PathCorpus(path=str(tmp_path / "none")))
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="holds no sound files"):
        discover(PathCorpus(path=str(tmp_path)))


def manifest(tmp_path: Path, name: str = "set.tsv") -> Path:
    write_corpus(tmp_path, {"a/1.wav": 0.5, "a/2.wav": 0.5, "outside.wav": 0.5})
    lines = [
        "path\tspeaker\ttext\tduration_s\tsplit\tsex",
        '1.wav\tann\tsaid "yes\t0.5\ttrain\tf',
        "2.wav\tbob\t\t\ttest\t",
        "../outside.wav\teve\t\t\ttrain\t",
        "/etc/passwd\teve\t\t\ttrain\t",
        "missing.wav\teve\t\t\ttrain\t",
        "1.wav\tann\t\t\ttrain\t",
        "\tann\t\t\ttrain\t",
        "nul\0.wav\tann\t\t\ttrain\t",
    ]
    path = tmp_path / "a" / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_manifest_paths_outside_the_root_are_rejected(tmp_path: Path) -> None:
    found = discover(ManifestCorpus(path=str(manifest(tmp_path)), language="en"))
    first = found.files[0]
    assert [file.file_id for file in found.files] == ["1.wav", "2.wav"]
    assert (first.speaker, first.text, first.seconds, first.labels["sex"]) == ("ann", 'said "yes', 0.5, "f")
    assert (first.corpus, first.language) == ("set", "en")
    listed = [(reject.file_id, reject.reason) for reject in found.rejects]
    assert sorted(listed) == sorted(
        [
            ("../outside.wav", "outside_root"),
            ("/etc/passwd", "outside_root"),
            ("missing.wav", "vanished"),
            ("1.wav", "listed_twice"),
            ("", "no_path"),
            ("nul\0.wav", "no_path"),
        ]
    )


def test_links_that_point_outside_the_root_are_rejected(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    (path.parent / "sneaky.wav").symlink_to(tmp_path / "outside.wav")
    path.write_text("path\nsneaky.wav\n")
    assert reasons(discover(ManifestCorpus(path=str(path)))) == {"sneaky.wav": "outside_root"}
    allowed = discover(ManifestCorpus(path=str(path), allow_outside=True))
    assert [file.file_id for file in allowed.files] == ["sneaky.wav"]


@pytest.mark.parametrize("field", ["corpus", "language"])
def test_a_manifest_that_names_a_corpus_for_each_row_is_refused(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "MOST_NAMES", 2)
    for name in "abc":
        (tmp_path / f"{name}.wav").touch()
    table = tmp_path / "set.tsv"
    table.write_text(f"path\t{field}\na.wav\tx\nb.wav\ty\nc.wav\tx\n")
    assert len(discover(ManifestCorpus(path=str(table))).files) == 3
    table.write_text(f"path\t{field}\na.wav\tx\nb.wav\ty\nc.wav\tz\n")
    with pytest.raises(ConfigError, match=rf"more than 2 values of {field}, such as 'x', .*columns\.{field}=COLUMN"):
        discover(ManifestCorpus(path=str(table)))


def test_splits_and_custom_column_names_are_read(tmp_path: Path) -> None:
    path = manifest(tmp_path).with_name("set.jsonl")
    rows = [{"clip": "1.wav", "who": "ann", "split": "train"}, {"clip": "2.wav", "who": "bob", "split": "test"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = ManifestCorpus(path=str(path), columns={"path": "clip", "speaker": "who"}, splits=("test",))
    assert [(file.file_id, file.speaker) for file in discover(corpus).files] == [("2.wav", "bob")]
    with pytest.raises(ConfigError, match=r"corpus\.columns\.path=klip; its columns are: clip, who, split"):
        discover(ManifestCorpus(path=str(path), columns={"path": "klip"}))
    path.write_text("{")
    with pytest.raises(ConfigError, match="row 1 is not JSON"):
        discover(ManifestCorpus(path=str(path)))


@pytest.mark.real_speech
def test_every_row_of_a_real_manifest_is_read(real_speech: Path) -> None:
    manifest = real_speech / "manifest.tsv"
    with manifest.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wanted = [row for row in table if row["split"] in ("pretrain", "train")]
    found = discover(ManifestCorpus(path=str(manifest), splits=("pretrain", "train")))
    assert len(found.files) == len(wanted)
    assert not found.rejects
    assert {file.corpus for file in found.files} == {row["corpus"] for row in wanted}
