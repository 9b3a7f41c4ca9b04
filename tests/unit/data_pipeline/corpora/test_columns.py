"""Names of columns and units of times that tools write into manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from tests.support.edge_case_manifests import jsonl, one_recording, read_rows, reasons
from tests.support.sounds import write_corpus

PARTS = [(0.0, 4.0, "one"), (5.0, 9.5, "two")]

STARTS_AND_ENDS = [
    ("Start", "End"),
    ("START", "STOP"),
    ("start_sec", "end_sec"),
    ("start_seconds", "end_seconds"),
    ("start_second", "end_second"),
    ("begin_sec", "end_sec"),
    ("start_time_s", "end_time_s"),
    ("startTime", "endTime"),
    ("Start Time", "End Time"),
    ("start-time", "end-time"),
    ("start_ts", "end_ts"),
    ("segment_start", "segment_end"),
    ("seg_start", "seg_end"),
    ("utt_start_time", "utt_end_time"),
    ("audio_start", "audio_end"),
    ("t_start", "t_end"),
    ("timestamp_start", "timestamp_end"),
    ("start_offset", "end_offset"),
    ("from", "to"),
    ("From", "To"),
    ("xmin", "xmax"),
    ("tmin", "tmax"),
    ("Begin Time (s)", "End Time (s)"),
    ("Begin Time - ss.msec", "End Time - ss.msec"),
    ("onset", "offset"),
    ("Onset", "Offset"),
    ("onset_s", "offset_s"),
]
STARTS_AND_LENGTHS = [
    ("offset", "dur"),
    ("offset", "duration_sec"),
    ("offset", "length"),
    ("Offset", "Duration"),
    ("audio_offset", "duration_s"),
    ("start", "length"),
    ("start", "len"),
    ("start", "length_s"),
    ("start", "duration_seconds"),
    ("onset", "duration"),
    ("Turn Onset", "Turn Duration"),
    ("tbeg", "tdur"),
    ("begin", "segment_duration"),
    ("start", "DurationSeconds"),
]


def rows_of(begin: str, end: str, unit: float = 1.0, *, length: bool = False) -> list[dict[str, Any]]:
    return [{begin: a * unit, end: (b - a * length) * unit, "text": text} for a, b, text in PARTS]


def parts_of(path: Path, **config: Any) -> list[tuple[float, float | None, str]]:
    found = read_rows(path, **config)
    assert not found.rejects
    [file] = found.files
    return [(s.start / SAMPLE_RATE, s.stop and s.stop / SAMPLE_RATE, s.text) for s in file.spans]


@pytest.mark.parametrize(("begin", "end"), STARTS_AND_ENDS)
def test_names_of_begin_and_end(tmp_path: Path, begin: str, end: str) -> None:
    assert parts_of(one_recording(tmp_path, rows_of(begin, end), 0.1)) == PARTS


@pytest.mark.parametrize(("begin", "length"), STARTS_AND_LENGTHS)
def test_names_of_begin_and_length(tmp_path: Path, begin: str, length: str) -> None:
    assert parts_of(one_recording(tmp_path, rows_of(begin, length, length=True), 0.1)) == PARTS


@pytest.mark.parametrize(
    ("begin", "end", "unit", "length"),
    [
        ("start_ms", "end_ms", 1e3, False),
        ("startMs", "endMs", 1e3, False),
        ("start[ms]", "duration[ms]", 1e3, True),
        ("Begin Time - msec", "End Time - msec", 1e3, False),
        ("offset_ms", "duration_ms", 1e3, True),
        ("start_us", "end_us", 1e6, False),
        ("start_time_ns", "end_time_ns", 1e9, False),
    ],
)
def test_a_unit_in_a_name_is_used(tmp_path: Path, begin: str, end: str, unit: float, length: bool) -> None:
    assert parts_of(one_recording(tmp_path, rows_of(begin, end, unit, length=length), 0.1)) == PARTS


def test_units_differ_between_columns_and_hold_for_chosen_ones(tmp_path: Path) -> None:
    rows = [{"start_ms": a * 1e3, "duration": b - a, "text": text} for a, b, text in PARTS]
    assert parts_of(one_recording(tmp_path, rows, 0.1)) == PARTS
    path = one_recording(tmp_path, rows_of("inicio_ms", "fin_ms", 1e3), 0.1)
    assert parts_of(path, columns={"begin": "inicio_ms", "end": "fin_ms"}) == PARTS


@pytest.mark.parametrize(
    ("begin", "end", "length"),
    [
        ("start_sample", "end_sample", False),
        ("start_frame", "end_frame", False),
        ("frame_offset", "num_frames", True),
        ("start", "end", False),
    ],
)
def test_samples_need_their_rate(tmp_path: Path, begin: str, end: str, length: bool) -> None:
    path = one_recording(tmp_path, rows_of(begin, end, 8000, length=length), 0.1)
    assert parts_of(path, units_per_second=8000) == PARTS
    if begin != "start":
        with pytest.raises(ConfigError, match=rf"{begin}.*columns=.*units_per_second"):
            read_rows(path)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("start", "sample_end"),
        ("start", "duration_frames"),
        ("offset", "n_samples"),
        ("begin", "audio_duration"),
        ("start", "offset"),
        ("start", "time_2"),
        ("speech_start_at_sample", "end"),
        ("starting", "ending"),
    ],
)
def test_times_in_unknown_columns_are_refused_by_name(tmp_path: Path, begin: str, end: str) -> None:
    path = one_recording(tmp_path, rows_of(begin, end), 0.1)
    with pytest.raises(ConfigError, match=r"corpus\.columns=\{begin: NAME, end: NAME\}") as caught:
        read_rows(path)
    assert end in str(caught.value) or begin in str(caught.value)
    assert parts_of(path, columns={"begin": begin, "end": end}) == PARTS


def test_pairs_of_times_are_refused_by_name(tmp_path: Path) -> None:
    path = one_recording(tmp_path, [{"timestamp": [a, b], "text": text} for a, b, text in PARTS], 0.1)
    with pytest.raises(ConfigError, match="timestamp"):
        read_rows(path)


@pytest.mark.parametrize("end", ["fin", "d", "bis", "extent"])
def test_parts_without_any_end_are_refused_if_they_overlap(tmp_path: Path, end: str) -> None:
    path = one_recording(tmp_path, rows_of("start", end), 0.1)
    with pytest.raises(ConfigError, match=rf"rows 1 and 2 of long\.flac would overlap.*columns are: .*{end}"):
        read_rows(path)
    assert parts_of(path, columns={"end": end}) == PARTS
    assert parts_of(path, columns={"end": ""}) == [(0.0, None, "one"), (5.0, None, "two")]
    single = jsonl(tmp_path / "single.jsonl", [{"path": "long.flac", "start": 5.0, "text": "to the end"}])
    assert parts_of(single) == [(5.0, None, "to the end")]


def test_one_row_with_times_in_unknown_columns_is_a_reject(tmp_path: Path) -> None:
    rows = [*rows_of("start", "end"), {"start": 6.0, "n_samples": 4000, "text": "lost"}]
    found = read_rows(one_recording(tmp_path, rows, 0.1))
    assert reasons(found) == [(3, "unread_times")]
    assert [span.text for span in found.files[0].spans] == ["one", "two"]


def test_a_column_can_be_left_out(tmp_path: Path) -> None:
    rows = [{"start": 1.0, "frames": 3, "text": "one", "channel": "news"}]
    path = one_recording(tmp_path, rows, 0.1)
    assert parts_of(path, columns={"end": "", "channel": ""}) == [(1.0, None, "one")]
    [file] = read_rows(path, columns={"begin": "", "channel": ""}).files
    assert (file.spans, file.text) == ((), "one")
    assert dict(file.labels) == {"start": "1.0", "frames": "3", "channel": "news"}


@pytest.mark.parametrize(
    "row",
    [
        {"gender": 1, "legend": 3, "sample_rate": 16000, "age": 40},
        {"start_char": 0, "end_char": 20, "start_date": 20200101},
        {"from": "Berlin", "to": "Hamburg"},
        {"length": 42, "size": 100},
        {"words": [{"word": "a", "start": 0.1, "end": 0.2}]},
        {"time": "2020-01-01 10:00:00"},
    ],
)
def test_labels_are_no_times(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read_rows(one_recording(tmp_path, [{**row, "text": "all"}], 0.1))
    assert not found.rejects
    assert [(file.spans, file.text, file.seconds, set(file.labels)) for file in found.files] == [
        ((), "all", 0.0, set(row))
    ]


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("00:00:05", "00:00:09.5"),
        ("0:05", "0:09.500"),
        ("00:00:05,000", "00:00:09,500"),
        (" 5.0 ", "9.5"),
        ("5", ".95e1"),
    ],
)
def test_numbers_and_clock_times(tmp_path: Path, begin: str, end: str) -> None:
    assert parts_of(one_recording(tmp_path, [{"start": begin, "end": end, "text": "two"}], 0.1)) == [PARTS[1]]


@pytest.mark.parametrize("begin", ["1_0", "5,5", "0x5", "٥", "1:75", "five", "5 s", "1e999", ""])
def test_what_is_no_time_is_a_reject(tmp_path: Path, begin: str) -> None:
    found = read_rows(one_recording(tmp_path, [{"begin": begin, "end": 100.0, "text": "one"}], 0.1))
    assert (found.files, reasons(found)) == ([], [(1, "bad_span")])


@pytest.mark.parametrize(
    ("path", "speaker", "text", "language"),
    [
        ("path", "Speaker", "Text", "Language"),
        ("Audio_FilePath", "SPEAKER_ID", "TRANSCRIPT", "LANG"),
        ("wav_filename", "spk_id", "transcript", "Locale"),
        ("file_name", "Speaker ID", "Transcription", "Language Code"),
        ("Audio Path", "speakerId", "normalized_text", "langCode"),
        ("filepath", "client_id", "Sentence", "locale"),
    ],
)
def test_case_and_separators_of_names_do_not_count(
    tmp_path: Path, path: str, speaker: str, text: str, language: str
) -> None:
    write_corpus(tmp_path, {"a.wav": 0.1})
    (tmp_path / "set.csv").write_text(f"{path},{speaker},{text},{language}\na.wav,ann,words,de\n")
    [file] = read_rows(tmp_path / "set.csv").files
    assert (file.speaker, file.text, file.language, dict(file.labels)) == ("ann", "words", "de", {})


def test_an_exact_name_takes_precedence(tmp_path: Path) -> None:
    rows = [{"Text": "Cased", "text": "exact", "Start": 2.0, "start": 1.0, "end": 3.0}]
    [file] = read_rows(one_recording(tmp_path, rows, 0.1)).files
    assert [(span.start, span.text) for span in file.spans] == [(SAMPLE_RATE, "exact")]


def test_an_unknown_column_of_paths_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.columns=\{path: NAME\}.*its columns are: where"):
        read_rows(jsonl(tmp_path / "set.jsonl", [{"where": "a.wav"}]))


def test_a_source_that_is_a_url_is_a_label(tmp_path: Path) -> None:
    rows = [{"source": "https://example.org/a", "text": "one"}]
    [file] = read_rows(one_recording(tmp_path, rows, 0.1), corpus="calls").files
    assert (file.corpus, dict(file.labels)) == ("calls", {"source": "https://example.org/a"})
