"""Known corpora: each row of their tables becomes a segment or a reject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.config import (
    CommonVoiceCorpus,
    GigaSpeechCorpus,
    LibriSpeechCorpus,
    MlsCorpus,
    VoxPopuliCorpus,
)
from data_pipeline.corpora.discovery import discover
from tests.support.edge_case_manifests import common_voice, giga_segment, gigaspeech, reasons, samples_of
from tests.support.sounds import write_corpus


def test_missing_clips_are_rejects(tmp_path: Path) -> None:
    rows = [(f"{number}.mp3", f"text {number}") for number in range(7)]
    root = common_voice(tmp_path, [f"{number}.mp3" for number in (0, 2, 4, 6)], [*rows, ("", "no clip"), rows[0]])
    found = discover(CommonVoiceCorpus(path=str(root), splits=("train",)))
    assert [file.text for file in found.files] == ["text 0", "text 2", "text 4", "text 6"]
    assert reasons(found) == [(2, "vanished"), (4, "vanished"), (6, "vanished"), (8, "bad_row"), (9, "listed_twice")]
    assert all("train.tsv" in reject.error for reject in found.rejects)


@pytest.mark.parametrize(
    ("clip", "named"),
    [
        ("a.mp3", "a"),
        ("a.mp3", "a.mp3"),
        ("a.wav", "a.mp3"),
        ("a.flac", "a"),
        ("common_voice_de_1.2.mp3", "common_voice_de_1.2"),
    ],
)
def test_a_table_may_omit_the_file_extension(tmp_path: Path, clip: str, named: str) -> None:
    root = common_voice(tmp_path, [clip], [(named, "text")])
    [file] = discover(CommonVoiceCorpus(path=str(root), splits=("train",))).files
    assert (file.file_id, file.text) == (f"clips/{clip}", "text")


def test_the_exact_file_name_takes_precedence_over_one_with_the_same_stem(tmp_path: Path) -> None:
    root = common_voice(tmp_path, ["a.flac", "a.mp3"], [("a.mp3", "text")])
    found = discover(CommonVoiceCorpus(path=str(root), splits=("train",)))
    assert [file.file_id for file in found.files] == ["clips/a.mp3"]
    assert found.skipped[".flac"] == 1


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"""Ja"", sagte er."', '"Ja", sagte er.'),
        ('"ganz in Zeichen"', "ganz in Zeichen"),
        ('er sagt "ja', 'er sagt "ja'),
        ('"kein Ende', '"kein Ende'),
        ('"Ja" sagte er "nein"', '"Ja" sagte er "nein"'),
        ('"', '"'),
        ('""', ""),
    ],
)
def test_quotes_in_transcripts_are_kept(tmp_path: Path, cell: str, text: str) -> None:
    root = common_voice(tmp_path, ["a.mp3", "b.mp3"], [("a.mp3", cell), ("b.mp3", "the next row")])
    assert [file.text for file in discover(CommonVoiceCorpus(path=str(root), splits=("train",))).files] == [
        text,
        "the next row",
    ]


def test_gigaspeech_filters_subsets_and_garbage_by_segment(tmp_path: Path) -> None:
    segments = [
        giga_segment(0.0, 1.0, "FIRST <COMMA> WORDS", ("{XL}", "{S}")),
        giga_segment(1.0, 2.0, "<MUSIC>", ("{XL}", "{S}")),
        giga_segment(2.0, 3.0, "NOT IN S", ("{XL}",)),
        giga_segment(3.0, 4.0, "SECOND", ("{XL}", "{S}")),
        giga_segment(5.0, 5.0, "EMPTY", ("{XL}", "{S}")),
        {"sid": "odd", "subsets": ["{S}"]},
    ]
    audio = {"path": "p1.flac", "duration": 6.0, "subsets": ["{XL}", "{S}"], "segments": segments}
    root = gigaspeech(tmp_path, [audio], {"p1.flac": 6.0})
    corpus = GigaSpeechCorpus(path=str(root), splits=("{S}",))
    found = discover(corpus)
    assert [(span.text, span.split) for span in found.files[0].spans] == [
        ("FIRST <COMMA> WORDS", "{S}"),
        ("SECOND", "{S}"),
    ]
    assert sorted(reject.reason for reject in found.rejects) == ["bad_span", "bad_span", "garbage"]
    samples = samples_of(tmp_path / "out", {"name": "gigaspeech", "path": str(root), "splits": ["{S}"]})
    assert [sample["text"] for sample, _ in samples] == ["FIRST <COMMA> WORDS", "SECOND"]
    assert len(discover(GigaSpeechCorpus(path=str(root))).files[0].spans) == 3, "all subsets, without garbage"


def test_missing_and_malformed_gigaspeech_recordings_are_rejects(tmp_path: Path) -> None:
    whole = {"duration": 1.0, "subsets": ["{S}"], "segments": [giga_segment(0.0, 1.0)]}
    noise = {**whole, "path": "noise.flac", "segments": [giga_segment(0.0, 1.0, "<NOISE>")]}
    other = {**whole, "path": "other.flac", "segments": [giga_segment(0.0, 1.0, subsets=["{XL}"])]}
    audios: list[Any] = [{**whole, "path": "p1.flac"}, {**whole, "path": "gone.flac"}, whole, "odd", noise, other]
    root = gigaspeech(tmp_path, audios, {"p1.flac": 1.0, "noise.flac": 1.0, "other.flac": 1.0})
    found = discover(GigaSpeechCorpus(path=str(root), splits=("{S}",)))
    assert [file.file_id for file in found.files] == ["p1.flac"]
    assert reasons(found) == [(2, "vanished"), (3, "bad_row"), (4, "bad_row"), (5, "garbage")]
    assert {reject.file_id for reject in found.rejects if reject.recording} == {"gone.flac", "noise.flac"}
    for table in ("[]", "{", '{"audios": 3}'):
        (root / "GigaSpeech.json").write_text(table)
        with pytest.raises(ConfigError, match=r"GigaSpeech\.json"):
            discover(GigaSpeechCorpus(path=str(root)))


@pytest.mark.parametrize(
    ("folder", "language"),
    [
        ("mls_german_opus", "german"),
        ("mls_german", "german"),
        ("mls_polish_opus/", "polish"),
        ("mls_portuguese", "portuguese"),
    ],
)
def test_mls_language_is_read_in_both_distributions(tmp_path: Path, folder: str, language: str) -> None:
    write_corpus(tmp_path / folder, {"train/audio/10/20/10_20_0.flac": 0.1})
    (tmp_path / folder / "train" / "transcripts.txt").write_text(
        "10_20_0\tguten tag\u0085wie geht es\n10_20_1\tfehlt\n"
    )
    found = discover(MlsCorpus(path=f"{tmp_path}/{folder}"))
    assert [(file.language, file.text) for file in found.files] == [(language, "guten tag\u0085wie geht es")]
    assert [(reject.file_id, reject.reason, reject.row) for reject in found.rejects] == [
        ("train/audio/10/20/10_20_1", "vanished", 2)
    ]


def test_transcripts_without_a_recording_are_rejects(tmp_path: Path) -> None:
    libri = write_corpus(tmp_path / "libri", {"dev-clean/84/121123/84-121123-0000.flac": 0.1})
    (libri / "dev-clean/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO\u2028ON\n84-121123-0001 GONE\n")
    found = discover(LibriSpeechCorpus(path=str(libri)))
    assert [file.text for file in found.files] == ["GO\u2028ON"]
    assert [(reject.file_id, reject.reason) for reject in found.rejects] == [
        ("dev-clean/84/121123/84-121123-0001.flac", "vanished")
    ]
    assert not discover(LibriSpeechCorpus(path=str(libri), splits=("dev-clean",))).skipped[".flac"]
    vox = write_corpus(tmp_path / "vox", {"de/2019/u1.ogg": 0.1})
    rows = ["id\tnormalized_text\tspeaker_id\tsplit", "u1\thallo\t0\ttrain", "u2\tweg\t7\ttrain", "u3\tweg\t7\tdev"]
    (vox / "de" / "asr_train.tsv").write_text("\n".join(rows))
    found = discover(VoxPopuliCorpus(path=str(vox), splits=("train",)))
    assert [(file.speaker, file.text) for file in found.files] == [("0", "hallo")]
    assert reasons(found) == [(2, "vanished")]
