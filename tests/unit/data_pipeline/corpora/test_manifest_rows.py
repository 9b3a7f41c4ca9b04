"""Manifests: each row becomes a segment or a reject and never changes the meaning of another row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from tests.support.edge_case_manifests import (
    jsonl,
    one_recording,
    read_rows,
    reasons,
    record_of,
    samples_of,
    two_people,
)
from tests.support.sounds import sound, write_corpus

NAN = float("nan")


def spans_of(path: Path, **config: Any) -> list[tuple[float, float | None, str]]:
    [file] = read_rows(path, **config).files
    return [(s.start / SAMPLE_RATE, s.stop and s.stop / SAMPLE_RATE, s.text) for s in file.spans]


@pytest.mark.parametrize(
    "names",
    [
        ("offset", "duration"),
        ("begin_s", "end_s"),
        ("start", "end"),
        ("start_time", "end_time"),
        ("begin", "stop"),
    ],
)
def test_every_row_of_a_recording_is_its_own_segment(tmp_path: Path, names: tuple[str, str]) -> None:
    spans = [(0.0, 4.0, "one"), (4.0, 9.0, "two"), (12.5, 20.0, "three")]
    rows = [
        {names[0]: begin, names[1]: end - begin if names[1] == "duration" else end, "text": text}
        for begin, end, text in spans
    ]
    path = one_recording(tmp_path, rows)
    assert spans_of(path) == spans
    found = samples_of(tmp_path / "out", {"name": "manifest", "path": str(path)})
    assert [(s["text"], s["start"], s["n_samples"]) for s, _ in found] == [
        (text, round(begin * SAMPLE_RATE), round((end - begin) * SAMPLE_RATE)) for begin, end, text in spans
    ]
    np.testing.assert_allclose(found[2][1], sound("long.flac", 20.0)[200_000:], atol=1e-4)


def test_column_aliases_have_the_same_meaning(tmp_path: Path) -> None:
    rows = [{"from": 1.0, "long": 2.0, "text": "one"}, {"from": 5.0, "long": 1.5, "text": "two"}]
    path = one_recording(tmp_path, rows)
    assert spans_of(path, columns={"begin": "from", "seconds": "long"}) == [(1.0, 3.0, "one"), (5.0, 6.5, "two")]
    ends = jsonl(tmp_path / "ends.jsonl", [{"path": "long.flac", "offset": 1.0, "duration": 3.0, "text": "one"}])
    assert spans_of(ends, columns={"begin": "offset", "end": "duration"}) == [(1.0, 3.0, "one")]


@pytest.mark.parametrize(
    "bad",
    [
        {"begin": 3.0, "end": 3.0},
        {"begin": NAN, "end": 5.0},
        {"begin": "5,5", "end": 7.0},
        {"begin": 6.0, "end": 5.0},
        {"begin": -1.0, "end": 5.0},
        {"begin": 1.0, "end": float("inf")},
        {"begin": True, "end": 5.0},
        {"begin": [1.0], "end": 5.0},
        {"begin": 1e9, "end": 2e9},
        {"begin": 1.0, "duration": NAN},
        {"begin": 1.0, "end": 1.00001},
        "{torn",
        "[1, 2]",
    ],
)
def test_an_invalid_row_is_a_reject_and_changes_no_other_row(tmp_path: Path, bad: dict[str, Any] | str) -> None:
    good = [{"begin": 0.0, "end": 4.0, "text": "one"}, {"begin": 5.0, "end": 9.0, "text": "two"}]
    odd = {**bad, "text": "bad"} if isinstance(bad, dict) else bad
    path = one_recording(tmp_path, [good[0], odd, good[1]])
    assert spans_of(path) == [(0.0, 4.0, "one"), (5.0, 9.0, "two")]
    [reject] = read_rows(path).rejects
    assert (reject.row, reject.reason) == (2, "bad_span" if isinstance(bad, dict) else "bad_row")
    assert reject.error.startswith("row 2")
    assert not reject.recording, "the recording is usable"


def test_spans_may_overlap_share_a_start_and_end_after_the_recording(tmp_path: Path) -> None:
    rows = [
        {"begin": 1.0, "end": 3.0, "text": "short"},
        {"begin": 1.0, "end": 6.0, "text": "long"},
        {"begin": 2.0, "end": 4.0, "text": "inside"},
        {"begin": 8.0, "end": 10.015, "text": "15 ms too long"},
        {"begin": 8.5, "end": 10.5, "text": "500 ms too long"},
        {"begin": 10.0, "end": 11.0, "text": "beyond"},
        {"begin": 50.0, "end": 51.0, "text": "far beyond"},
    ]
    path = one_recording(tmp_path, rows, seconds=10.0)
    found = samples_of(tmp_path / "out", {"name": "manifest", "path": str(path)})
    assert [(s["start"] / SAMPLE_RATE, s["n_samples"] / SAMPLE_RATE, s.get("text", "")) for s, _ in found] == [
        (1.0, 2.0, "short"),
        (1.0, 5.0, "long"),
        (2.0, 2.0, "inside"),
        (8.0, 2.0, "15 ms too long"),
        (8.5, 1.5, ""),
    ]
    wave = sound("long.flac", 10.0)
    for sample, audio in found:
        np.testing.assert_allclose(audio, wave[sample["start"] :][: sample["n_samples"]], atol=1e-4)
    record = record_of(tmp_path / "out")
    assert record.rejects == {"cut/beyond_end": 2}
    assert {row[2:5] for row in record.flow if row[2] == "text"} == {("text", "trimmed", 1)}
    listed = [json.loads(line) for line in (tmp_path / "out" / "_rejects" / f"{record.unit}.jsonl").open()]
    assert [row["row"] for row in listed] == [6, 7]


def test_rows_with_and_without_times_can_be_mixed(tmp_path: Path) -> None:
    rows = [
        {"duration": 4.0, "text": "an offset of 0 is left out"},
        {"offset": 5.0, "duration": 2.0, "text": "two"},
        {"offset": 15.0, "text": "to the end"},
        {"offset": 17.0, "end": -1, "text": "to the end, as Kaldi says it"},
        {"text": "all"},
    ]
    path = one_recording(tmp_path, rows)
    found = samples_of(tmp_path / "out", {"name": "manifest", "path": str(path)})
    assert [(s["start"] / SAMPLE_RATE, s["n_samples"] / SAMPLE_RATE, s["text"]) for s, _ in found] == [
        (0.0, 4.0, rows[0]["text"]),
        (0.0, 20.0, "all"),
        (5.0, 2.0, "two"),
        (15.0, 5.0, "to the end"),
        (17.0, 3.0, rows[3]["text"]),
    ]


def test_a_duration_without_a_start_covers_the_whole_recording(tmp_path: Path) -> None:
    [file] = read_rows(one_recording(tmp_path, [{"duration": 19.9, "offset": None, "text": "all"}])).files
    assert (file.spans, file.seconds, file.text) == ((), 19.9, "all")


def test_each_channel_is_its_own_segment(tmp_path: Path) -> None:
    left, right = two_people(tmp_path / "call.wav")
    rows = [
        {"path": "call.wav", "channel": 0, "text": "left"},
        {"path": "call.wav", "channel": "B", "text": "right"},
        {"path": "call.wav", "channel": 1, "offset": 1.0, "duration": 2.0, "text": "part of right"},
        {"path": "call.wav", "channel": 2, "text": "none"},
        {"path": "call.wav", "channel": 1.5, "text": "half"},
        {"path": "call.wav", "channel": -1, "text": "negative"},
    ]
    path = jsonl(tmp_path / "set.jsonl", rows)
    found = samples_of(tmp_path / "out", {"name": "manifest", "path": str(path)})
    heard = {sample["text"]: (sample, audio) for sample, audio in found}
    assert set(heard) == {"left", "right", "part of right"}
    np.testing.assert_allclose(heard["left"][1], left, atol=1e-4)
    np.testing.assert_allclose(heard["right"][1], right, atol=1e-4)
    np.testing.assert_allclose(heard["part of right"][1], right[16_000:48_000], atol=1e-4)
    assert record_of(tmp_path / "out").rejects == {"cut/no_channel": 1}
    assert reasons(read_rows(path)) == [(5, "bad_channel"), (6, "bad_channel")]


def test_rows_of_one_recording_keep_their_language_split_and_speaker(tmp_path: Path) -> None:
    rows = [
        {"begin": 0.0, "end": 2.0, "speaker": "ann", "language": "de", "split": "train"},
        {"begin": 2.0, "end": 4.0, "speaker": "bob", "language": "fr", "split": "test"},
    ]
    path = one_recording(tmp_path, rows)
    found = samples_of(tmp_path / "out", {"name": "manifest", "path": str(path)})
    known = [(s["speaker"], s["language"], s["labels"]["split"]) for s, _ in found]
    assert known == [("ann", "de", "train"), ("bob", "fr", "test")]


def test_a_duplicate_row_is_a_reject(tmp_path: Path) -> None:
    row = {"begin": 0.0, "end": 2.0, "text": "same"}
    found = read_rows(one_recording(tmp_path, [row, row, {**row, "text": "another reading"}]))
    assert reasons(found) == [(2, "listed_twice")]
    assert [span.text for span in found.files[0].spans] == ["same", "another reading"]


def test_rows_that_say_different_things_of_a_file_give_it_neither(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2, "b.wav": 0.2})
    rows = [
        {"path": "a.wav", "text": "one", "speaker": "ann", "mood": "calm", "take": 1},
        {"path": "b.wav", "text": "other"},
        {"path": "a.wav", "text": "two", "speaker": "ann", "mood": "calm", "take": 2},
        {"path": "a.wav", "text": "one", "speaker": "ann", "mood": "calm", "take": 1},
    ]
    found = read_rows(jsonl(tmp_path / "set.jsonl", rows))
    assert [(file.text, file.speaker, dict(file.labels)) for file in found.files] == [
        ("", "ann", {"mood": "calm"}),
        ("other", "", {}),
    ]
    assert reasons(found) == [(row, "rows_differ") for row in (1, 3, 4)]
    assert all("rows 1, 3, 4" in reject.error and "text, take" in reject.error for reject in found.rejects)
    assert not any(reject.recording for reject in found.rejects), "the recording is usable"


@pytest.mark.parametrize("field", ["speaker", "language", "split", "mood"])
def test_a_field_that_differs_is_unknown(tmp_path: Path, field: str) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    rows = [{"path": "a.wav", "text": "same", field: value} for value in ("x", "y")]
    found = read_rows(jsonl(tmp_path / "set.jsonl", rows))
    [file] = found.files
    assert (file.text, file.speaker, file.language, file.split, dict(file.labels)) == ("same", "", "", "", {})
    assert reasons(found) == [(1, "rows_differ"), (2, "rows_differ")]


def test_rows_that_complete_each_other_are_joined(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    rows = [{"path": "a.wav", "text": "one"}, {"path": "a.wav", "speaker": "ann", "mood": "calm"}]
    found = read_rows(jsonl(tmp_path / "set.jsonl", rows))
    assert [(file.text, file.speaker, dict(file.labels)) for file in found.files] == [("one", "ann", {"mood": "calm"})]
    assert reasons(found) == [(2, "listed_twice")]


def test_a_label_may_have_the_name_of_a_field(tmp_path: Path) -> None:
    rows = [{"words": "same", "text": value, "begin": 1.0, "end": 2.0} for value in ("x", "y")]
    found = read_rows(one_recording(tmp_path, rows, 4.0), columns={"text": "words"})
    assert [(span.text, dict(span.labels)) for span in found.files[0].spans] == [("same", {})]
    assert reasons(found) == [(1, "rows_differ"), (2, "rows_differ")]
    assert "begin: NAME" not in found.rejects[0].error


def test_rows_without_times_that_differ_beside_parts_of_the_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "all"},
        {"begin": 1.0, "end": 2.0, "text": "part"},
        {"text": "all of it"},
        {"channel": 0, "text": "left"},
        {"channel": "left", "text": "something else"},
        {"channel": 1, "text": "right"},
    ]
    path = one_recording(tmp_path, rows, 4.0)
    [file] = read_rows(path).files
    assert sorted((s.start, s.stop or 0, -1 if s.channel is None else s.channel, s.text) for s in file.spans) == [
        (0, 0, -1, ""),
        (0, 0, 0, ""),
        (0, 0, 1, "right"),
        (16_000, 32_000, -1, "part"),
    ]
    assert reasons(read_rows(path)) == [(row, "rows_differ") for row in (1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("value", "channel"),
    [("left", 0), ("Right", 1), ("L", 0), ("a", 0), ([0], 0), ("[1]", 1), ([1.0], 1), ("1.0", 1), ("2", 2)],
)
def test_names_of_channels(tmp_path: Path, value: Any, channel: int) -> None:
    [file] = read_rows(one_recording(tmp_path, [{"channel": value, "text": "one"}], 0.1)).files
    assert [(span.channel, span.text) for span in file.spans] == [(channel, "one")]


@pytest.mark.parametrize("value", ["average", "mean", "mix"])
def test_the_average_of_the_channels_is_the_whole_recording(tmp_path: Path, value: str) -> None:
    [file] = read_rows(one_recording(tmp_path, [{"channel_selector": value, "text": "one"}], 0.1)).files
    assert (file.spans, file.text) == ((), "one")


@pytest.mark.parametrize("value", ["1_0", "٣", [0, 1], "[0, 1]", [], "news", True, "1e3", {"index": 0}])
def test_what_is_no_channel_is_a_reject_with_the_remedy(tmp_path: Path, value: Any) -> None:
    found = read_rows(one_recording(tmp_path, [{"channel": value, "text": "one"}], 0.1))
    assert (found.files, reasons(found)) == ([], [(1, "bad_channel")])
    assert 'corpus.columns={channel: ""}' in found.rejects[0].error


@pytest.mark.parametrize("value", [0, False, 0.0, "0"])
def test_falsy_values_other_than_null_are_kept(tmp_path: Path, value: Any) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    path = jsonl(tmp_path / "set.jsonl", [{"path": "a.wav", "speaker": value, "text": value, "take": value}])
    [file] = read_rows(path).files
    shown = json.dumps(value).strip('"')
    assert (file.speaker, file.text, dict(file.labels)) == (shown, shown, {"take": shown})


def test_null_and_nan_are_missing_values(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    row = {"path": "a.wav", "speaker": None, "speaker_id": "ann", "text": NAN, "duration": NAN, "language": ""}
    [file] = read_rows(jsonl(tmp_path / "set.jsonl", [row])).files
    assert (file.speaker, file.text, file.seconds, file.language) == ("ann", "", 0.0, "")


def test_the_schema_is_inferred_from_all_rows(tmp_path: Path) -> None:
    write_corpus(tmp_path, dict.fromkeys(("a.wav", "b.wav", "c.wav"), 0.2))
    rows = [
        {"path": "a.wav"},
        {"audio_filepath": "b.wav", "speaker": "ann", "text": "words", "language": "de"},
        {"path": "c.wav", "speaker_id": "bob", "sentence": "more", "lang": "fr", " mood ": "calm"},
    ]
    found = read_rows(jsonl(tmp_path / "set.jsonl", rows)).files
    assert [(file.speaker, file.text, file.language) for file in found] == [
        ("", "", ""),
        ("ann", "words", "de"),
        ("bob", "more", "fr"),
    ]
    assert dict(found[2].labels) == {"mood": "calm"}
    with pytest.raises(ConfigError, match=r"corpus\.columns\.speaker=who"):
        read_rows(tmp_path / "set.jsonl", columns={"speaker": "who"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.csv", 'path, text, speaker \na.wav, "hello, world", ann\n'),
        ("set.csv", '\ufeffpath ,text,speaker\r\na.wav,"hello, world",ann\r\n'),
        ("set.csv", "path;text;speaker\na.wav;hello, world;ann\n"),
        ("set.csv", "path\ttext\tspeaker\na.wav\thello, world\tann\n"),
        ("set.tsv", " path\ttext \tspeaker\t\na.wav\thello, world\tann\t\n"),
        ("set.csv", 'path,text,speaker\na.wav,"hello, world",ann\n\n\n'),
    ],
)
def test_headers_and_cells_are_stripped(tmp_path: Path, name: str, content: str) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    [file] = read_rows(tmp_path / name).files
    assert (file.text, file.speaker) == ("hello, world", "ann")


def test_rows_with_a_wrong_number_of_cells_are_rejects(tmp_path: Path) -> None:
    write_corpus(tmp_path, dict.fromkeys(("a.wav", "b.wav", "c.wav"), 0.2))
    (tmp_path / "set.csv").write_text("path,text\na.wav,one, two\nb.wav,three\nc.wav\n")
    found = read_rows(tmp_path / "set.csv")
    assert [(file.file_id, file.text) for file in found.files] == [("b.wav", "three"), ("c.wav", "")]
    assert reasons(found) == [(1, "bad_row")]
    (tmp_path / "twice.csv").write_text("path,text,text\na.wav,one,two\n")
    with pytest.raises(ConfigError, match="'text' is named twice"):
        read_rows(tmp_path / "twice.csv")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_newlines_end_a_row(tmp_path: Path, mark: str) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    text = f"guten tag{mark}wie geht es"
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "a.wav", "text": text}, ensure_ascii=False) + "\n")
    (tmp_path / "a.tsv").write_text(f"path\ttext\na.wav\t{text}\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(f"path,text\na.wav,{text}\n", encoding="utf-8")
    for name in ("a.jsonl", "a.tsv", "a.csv"):
        found = read_rows(tmp_path / name)
        assert [file.text for file in found.files] == [text], name
        assert not found.rejects


@pytest.mark.parametrize("row", [b'{"path": "\xff.wav"}', b'{"path": "a.wav", "text": "\\ud800"}', b"[" * 5000, b"nul"])
def test_undecodable_rows_are_rejects(tmp_path: Path, row: bytes) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2, "b.wav": 0.2})
    (tmp_path / "set.jsonl").write_bytes(b'{"path": "a.wav"}\n' + row + b'\n{"path": "b.wav"}\n')
    found = read_rows(tmp_path / "set.jsonl")
    assert [file.file_id for file in found.files] == ["a.wav", "b.wav"]
    assert reasons(found) == [(2, "bad_row")]


def test_ids_are_normalised_paths(tmp_path: Path) -> None:
    root = tmp_path / "x"
    write_corpus(root, {"a.wav": 0.2, "sub/b.wav": 0.2})
    names = [
        "a.wav",
        "./a.wav",
        "../x/a.wav",
        f"{root}/a.wav",
        "sub//b.wav",
        "sub/../sub/b.wav",
        f"file://{root}/a.wav",
    ]
    found = read_rows(jsonl(root / "set.jsonl", [{"path": name} for name in names]))
    assert [file.file_id for file in found.files] == ["a.wav", "sub/b.wav"]
    assert reasons(found) == [(row, "listed_twice") for row in (2, 3, 4, 6, 7)]


def test_a_missing_recording_is_listed_once_per_row_and_counted_once(tmp_path: Path) -> None:
    rows = [{"path": "gone.wav", "begin": begin, "end": begin + 1} for begin in (0, 1, 2)]
    found = read_rows(jsonl(tmp_path / "set.jsonl", rows))
    assert reasons(found) == [(1, "vanished"), (2, "vanished"), (3, "vanished")]
    assert [reject.recording for reject in found.rejects] == [True, False, False]
