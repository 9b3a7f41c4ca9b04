"""Text with word times, and its formats: text, JSON, SRT, WebVTT and TSV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.core.text import table_cell, visible
from pretrain.interfaces.decoding import AlignedSymbol
from pretrain.recognition.config import Format

ENDINGS: dict[Format, str] = {"text": "txt", "json": "json", "srt": "srt", "vtt": "vtt", "tsv": "tsv"}
CUE_CHARACTERS = 84
"""Two lines of 42 characters, as subtitles usually have."""
CUE_SECONDS = 7.0
CUE_PAUSE = 0.8
"""Shortest pause, in seconds, that begins a new subtitle."""


class Word(NamedTuple):
    """A word from `start` to `end` seconds; confidence: geometric mean of the symbols' probabilities over frames."""

    text: str
    start: float
    end: float
    confidence: float


class DecodedPart(NamedTuple):
    """Audio from `start` to `end` seconds.  by: what decoded it, joint or attention, or ctc where a loop was found."""

    start: float
    end: float
    by: str


@dataclass(frozen=True)
class Transcript:
    """The text of a recording.

    seconds: its duration.  parts: those that were decoded one by one, where an attention decoder takes part.
    """

    name: str
    seconds: float
    words: tuple[Word, ...] = ()
    parts: tuple[DecodedPart, ...] = ()

    @property
    def text(self) -> str:
        """The words, with single spaces."""
        return " ".join(word.text for word in self.words)


@dataclass
class WordBuilder:
    """Joins aligned symbols to words; the text of a symbol may contain spaces."""

    rate_hz: float
    words: list[Word] = field(default_factory=list)
    _text: str = ""
    _frames: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, text: str, aligned: AlignedSymbol, offset: int) -> None:
        """Appends a symbol.

        Args:
            text: its text.
            aligned: its frames, counted from `offset`.
            offset: the first frame of the piece.
        """
        for number, part in enumerate(text.split(" ")):
            if number:
                self.end_word()
            if part:
                self._text += part
                self._frames.append((offset + aligned.start, offset + aligned.stop, aligned.log_prob))

    def end_word(self) -> None:
        """Ends the current word, if there is one."""
        if self._text:
            lengths = [stop - start for start, stop, _ in self._frames]
            mean = sum(n * p for n, (_, _, p) in zip(lengths, self._frames, strict=True)) / sum(lengths)
            start, stop = self._frames[0][0] / self.rate_hz, self._frames[-1][1] / self.rate_hz
            self.words.append(Word(self._text, start, stop, math.exp(mean)))
        self._text, self._frames = "", []


def word_values(word: Word) -> dict[str, Any]:
    """Returns a word as an object of JSON; times in seconds."""
    start, end, confidence = round(word.start, 3), round(word.end, 3), round(word.confidence, 4)
    return {"word": word.text, "start": start, "end": end, "confidence": confidence}


def format_transcript(transcript: Transcript, form: Format) -> str:
    """Returns a transcript as the content of a file. Control characters in text and names are escaped."""
    return "".join(f"{line}\n" for line in _WRITERS[form](transcript))


def _text(transcript: Transcript) -> Iterator[str]:
    yield visible(transcript.text)


def _json(transcript: Transcript) -> Iterator[str]:
    words = [word_values(word) for word in transcript.words]
    whole: dict[str, Any] = {"file": transcript.name, "seconds": round(transcript.seconds, 3)}
    whole |= {"text": transcript.text, "words": words}
    if transcript.parts:
        whole["parts"] = [
            {"start": round(part.start, 3), "end": round(part.end, 3), "by": part.by} for part in transcript.parts
        ]
    yield json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")


def _tsv(transcript: Transcript) -> Iterator[str]:
    yield "start\tend\tword\tconfidence"
    for word in transcript.words:
        yield f"{word.start:.3f}\t{word.end:.3f}\t{table_cell(word.text)}\t{word.confidence:.4f}"


def _srt(transcript: Transcript) -> Iterator[str]:
    for number, cue in enumerate(cues(transcript.words), 1):
        yield f"{number}\n{_clock(cue[0].start, ',')} --> {_clock(cue[-1].end, ',')}\n{_cue_text(cue)}\n"


def _vtt(transcript: Transcript) -> Iterator[str]:
    yield "WEBVTT\n"
    for cue in cues(transcript.words):
        text = _cue_text(cue).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        yield f"{_clock(cue[0].start, '.')} --> {_clock(cue[-1].end, '.')}\n{text}\n"


_WRITERS = {"text": _text, "json": _json, "tsv": _tsv, "srt": _srt, "vtt": _vtt}


def cues(words: Sequence[Word]) -> Iterator[list[Word]]:
    """Yields the words of each subtitle: at most two lines and seven seconds, and no long pause inside."""
    cue: list[Word] = []
    for word in words:
        if cue:
            characters = sum(len(w.text) + 1 for w in cue) + len(word.text)
            long = characters > CUE_CHARACTERS or word.end - cue[0].start > CUE_SECONDS
            if long or word.start - cue[-1].end > CUE_PAUSE:
                yield cue
                cue = []
        cue.append(word)
    if cue:
        yield cue


def _cue_text(cue: Sequence[Word]) -> str:
    """Returns the words in one line, or in two of about the same length if one is too long."""
    text = visible(" ".join(word.text for word in cue))
    if len(text) <= CUE_CHARACTERS // 2:
        return text
    spaces = [at for at, character in enumerate(text) if character == " "]
    if not spaces:
        return text
    middle = min(spaces, key=lambda at: abs(at - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def _clock(seconds: float, point: str) -> str:
    """Formats a time as HH:MM:SS and milliseconds."""
    milliseconds = round(1000 * seconds)
    whole, rest = divmod(milliseconds, 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{rest:03d}"
