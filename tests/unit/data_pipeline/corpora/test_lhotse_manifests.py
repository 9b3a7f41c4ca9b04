"""lhotse's recipes and manifests as corpora, on files that lhotse itself wrote."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Span
from data_pipeline.corpora.config import corpus_type
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import Discovered
from tests.support.foreign_tars import wave

RATE = 16_000


def find(path: Path, name: str = "lhotse", **values: Any) -> Discovered:
    return discover(load(corpus_type(name), {"name": name, "path": str(path), **values}))


def sound(path: Path, seconds: float, channels: int = 1) -> Recording:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = wave(len(path.name), seconds)
    soundfile.write(path, np.stack([audio] * channels, 1), RATE)
    return Recording.from_file(path, recording_id=path.stem)


def test_a_recipe_gives_what_the_layout_of_the_same_corpus_gives(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for split, speaker in (("dev-clean", "84"), ("train-clean-100", "19"), ("train-clean-100", "26")):
        folder = root / split / speaker / "121"
        names = [f"{speaker}-121-{number:04d}" for number in range(2)]
        for name in names:
            sound(folder / f"{name}.flac", 1.0)
        (folder / f"{speaker}-121.trans.txt").write_text("".join(f"{name} WORDS OF {name}\n" for name in names))
    (root / "SPEAKERS.TXT").write_text("")
    found = find(root, recipe="librispeech", options={"dataset_parts": ["dev-clean", "train-clean-100"]})
    expected = find(root, "librispeech")
    assert not found.rejects
    facts = [(file.file_id, file.speaker, file.text, file.split, file.size) for file in expected.files]
    assert len(facts) == 6
    assert [(file.file_id, file.speaker, file.text, file.split, file.size) for file in found.files] == facts
    assert {(file.corpus, file.spans) for file in found.files} == {("librispeech", ())}
    some = find(
        root, recipe="librispeech", options={"dataset_parts": ["dev-clean", "train-clean-100"]}, splits=["dev-clean"]
    )
    assert [file.split for file in some.files] == ["dev-clean"] * 2


def test_recordings_and_supervisions_on_disk(tmp_path: Path) -> None:
    talk, quiet, stereo = (sound(tmp_path / "audio" / f"{name}.wav", 4.0, 1 + (name == "c")) for name in "abc")
    listed = [
        SupervisionSegment("s1", "a", 0.5, 1.0, speaker="x", text="one", language="de", gender="f"),
        SupervisionSegment("s2", "a", 2.0, 1.5, speaker="y", text="two", language="de"),
        SupervisionSegment("s3", "c", 1.0, 1.0, channel=1, speaker="z"),
    ]
    RecordingSet.from_recordings([talk, quiet, stereo]).to_file(tmp_path / "calls_recordings_train.jsonl.gz")
    SupervisionSet.from_segments(listed).to_file(tmp_path / "calls_supervisions_train.jsonl.gz")
    CutSet.from_cuts([talk.to_cut()]).to_file(tmp_path / "calls_cuts_train.jsonl.gz")
    found = find(tmp_path, corpus="calls")
    assert not found.rejects
    a, b, c = found.files
    assert (a.file_id, a.corpus, a.split, a.language) == ("audio/a.wav", "calls", "train", "de")
    assert [(s.start, s.stop, s.speaker, s.text, s.channel) for s in a.spans] == [
        (8000, 24000, "x", "one", None),
        (32000, 56000, "y", "two", None),
    ]
    assert a.spans[0].labels == {"gender": "f"}
    assert (b.file_id, b.spans, b.speaker) == ("audio/b.wav", (), "")
    assert [(s.start, s.stop, s.speaker, s.channel) for s in c.spans] == [(16000, 32000, "z", 1)]
    assert not find(tmp_path / "calls_recordings_train.jsonl.gz").files[0].spans, "a file alone, without supervisions"


def test_cuts_become_stretches_of_their_recordings(tmp_path: Path) -> None:
    recording = sound(tmp_path / "a.wav", 6.0)
    spoken = SupervisionSegment("s", "a", 0.5, 1.0, speaker="x", text="hello")
    cuts = [
        MonoCut("plain", 1.0, 2.0, 0, recording=recording),
        MonoCut("spoken", 3.0, 2.0, 0, recording=recording, supervisions=[spoken]),
    ]
    CutSet.from_cuts([*cuts, cuts[0].append(cuts[1])]).to_file(tmp_path / "cuts.jsonl.gz")
    found = find(tmp_path)
    [file] = found.files
    assert [(s.start, s.stop, s.speaker, s.text) for s in file.spans] == [
        (16000, 48000, "", ""),
        (56000, 72000, "x", "hello"),
    ]
    [reject] = found.rejects
    assert "only cuts of one recording" in reject.error


def test_what_cannot_be_read_is_a_reject_and_no_command_is_run(tmp_path: Path) -> None:
    good = sound(tmp_path / "good.wav", 2.0)
    command = Recording("evil", [AudioSource("command", [0], f"touch {tmp_path}/ran")], RATE, RATE, 1.0, [0])
    parts = Recording("parts", [*good.sources, AudioSource("file", [1], "other.wav")], RATE, 2 * RATE, 2.0, [0, 1])
    lost = Recording("lost", [AudioSource("file", [0], "lost.wav")], RATE, RATE, 1.0, [0])
    rows = [json.dumps(recording.to_dict()) for recording in (good, command, parts, lost)]
    orphan = SupervisionSegment("s", "nobody", 0.0, 1.0)
    (tmp_path / "recordings.jsonl.gz").write_bytes(gzip.compress("\n".join([*rows, "{broken"]).encode()))
    SupervisionSet.from_segments([orphan]).to_file(tmp_path / "supervisions.jsonl.gz")
    found = find(tmp_path)
    assert [(file.file_id, file.spans) for file in found.files] == [("good.wav", tuple[Span, ...]())]
    errors = " | ".join(reject.error for reject in found.rejects)
    assert len(found.rejects) == 5
    for said in ("no commands are run", "spread over 2 files", "no such file", "nobody, which is not listed"):
        assert said in errors
    assert not (tmp_path / "ran").exists()


def test_wrong_settings_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no manifests of lhotse"):
        find(tmp_path)
    with pytest.raises(ConfigError, match=r"no such recipe.*librispeech"):
        find(tmp_path, recipe="libri_speech")
    with pytest.raises(ConfigError, match=r"corpus\.options"):
        find(tmp_path, recipe="librispeech", options={"dataset_parts": "no-such-part"})
