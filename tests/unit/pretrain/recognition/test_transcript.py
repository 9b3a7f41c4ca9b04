"""Words from symbols, and the formats of transcripts."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from pretrain.interfaces.decoding import AlignedSymbol
from pretrain.recognition.transcript import Transcript, Word, WordBuilder, cues, format_transcript


def built(symbols: list[str], rate_hz: float = 10.0) -> list[Word]:
    builder = WordBuilder(rate_hz)
    for number, text in enumerate(symbols):
        builder.add(text, AlignedSymbol(2 * number, 2 * number + 1, math.log(0.5)), offset=100)
    builder.end_word()
    return builder.words


def test_words_have_the_times_of_their_symbols() -> None:
    assert built([" ", "n", "o", " ", " ", "y", "e"]) == [
        Word("no", pytest.approx(10.2), pytest.approx(10.5), pytest.approx(0.5)),  # type: ignore[arg-type]
        Word("ye", pytest.approx(11.0), pytest.approx(11.3), pytest.approx(0.5)),  # type: ignore[arg-type]
    ]


def test_a_symbol_may_hold_several_letters_and_a_space() -> None:
    assert [word.text for word in built([" the", " cat", "s", " in the", " sun "])] == [
        "the",
        "cats",
        "in",
        "the",
        "sun",
    ]


@pytest.fixture
def made() -> Transcript:
    words = [Word("a" * 8, 0.9 * i, 0.9 * i + 0.5, 0.5) for i in range(20)]
    return Transcript("x.wav", 3700.0, (*words, Word("<b>\x1b=1", 3661.0, 3661.5, 1.0)))


def test_json_and_tsv_are_read_back(made: Transcript) -> None:
    found = json.loads(format_transcript(made, "json"))
    assert found["file"] == "x.wav"
    assert found["seconds"] == 3700.0
    assert found["text"] == made.text
    assert found["words"][1] == {"word": "a" * 8, "start": 0.9, "end": 1.4, "confidence": 0.5}
    rows = list(csv.DictReader(io.StringIO(format_transcript(made, "tsv")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 21
    assert rows[-1]["word"] == "<b>\\x1b=1"
    assert rows[2]["start"] == "1.800"


@pytest.mark.parametrize("form", ["text", "srt", "vtt", "tsv", "json"])
def test_no_control_character_of_a_vocabulary_is_printed(made: Transcript, form: str) -> None:
    assert "\x1b" not in format_transcript(made, form)  # type: ignore[arg-type]


def test_subtitles_are_numbered_and_timed(made: Transcript) -> None:
    blocks = format_transcript(made, "srt").split("\n\n")
    assert blocks[0].splitlines()[:2] == ["1", "00:00:00,000 --> 00:00:06,800"]
    assert "01:01:01,000 --> 01:01:01,500" in blocks[-2]
    vtt = format_transcript(made, "vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:06.800\n")
    assert "&lt;b&gt;" in vtt
    assert format_transcript(Transcript("x", 1.0), "srt") == ""


def test_cues_have_every_word_and_end_at_pauses(made: Transcript) -> None:
    found = list(cues(made.words))
    assert [word for cue in found for word in cue] == list(made.words)
    assert all(cue[-1].end - cue[0].start <= 7 and len(" ".join(w.text for w in cue)) <= 84 for cue in found)
    assert len(found[-1]) == 1
