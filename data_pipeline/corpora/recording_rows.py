"""Joins the rows of a manifest that are of one recording: parts of its audio, repetitions and contradictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.recordings import FileRow, file_of, row_of
from data_pipeline.corpora.records import Reject, reject_file, sorted_spans

SAID: Final = ("speaker", "language", "text", "split", "image")
"""Fields of `AudioFile` that a row gives beside its labels."""
MOST_NUMBERS: Final = 5


PlainEntry = tuple[int, tuple[Any, ...], tuple[int, int | None, int | None] | None, bool]
"""Number of a row, its file, start, end and channel of the part that it selects, and whether it has times."""


@dataclass(frozen=True)
class RecordingRow:
    """A usable row: its file, with the row's metadata, and the part that it selects."""

    file: AudioFile
    span: Span | None
    """None: the whole file."""
    number: int
    has_times: bool
    """Whether the row itself limits the part."""

    def plain(self) -> PlainEntry:
        """Returns the row as plain values."""
        part = None if self.span is None else (self.span.start, self.span.stop, self.span.channel)
        return self.number, tuple(row_of(self.file)), part, self.has_times

    @staticmethod
    def from_plain(plain: PlainEntry) -> RecordingRow:
        """Returns the row of plain values."""
        number, row, part, has_times = plain
        file = file_of(FileRow(*row))
        if part is None:
            return RecordingRow(file, None, number, has_times)
        start, stop, channel = part
        said = (file.speaker, file.text, file.labels)
        span = Span(start, stop, *said, channel=channel, row=number, image=file.image)
        return RecordingRow(file, span, number, has_times)


def whole_row(plain: PlainEntry) -> FileRow | None:
    """Returns the recording of a row that is of a whole file; None for a row of a part."""
    return FileRow(*plain[1]) if plain[2] is None else None


def join_rows(rows: Sequence[RecordingRow]) -> tuple[AudioFile, list[Reject]]:
    """Joins all rows of a recording.

    Rows with the same times, channel, speaker and text are repetitions, and so are rows of the same audio without
    times. Those without times that differ have no known meaning: which text is right, or which part has it?

    Returns:
        The recording, and a reject for each row that repeats or contradicts another one.
    """
    only = all(row.span is None for row in rows)
    parts = dict[object, list[tuple[RecordingRow, Span | None]]]()
    for row in rows:
        span = None if only else row.span or _whole_as_span(row)
        said = (row.file.speaker, row.file.text) if row.has_times else ()
        parts.setdefault(span and (span.start, span.stop, span.channel, *said), []).append((row, span))
    rejects: list[Reject] = []
    kept: list[tuple[AudioFile, Span | None]] = []
    for same in parts.values():
        file, differing = _agreed([row.file for row, _ in same])
        rejects += _rejects([row for row, _ in same], differing)
        span = same[0][1]
        if span:
            span = dataclasses.replace(span, speaker=file.speaker, text=file.text, labels=file.labels, image=file.image)
        kept.append((file, span))
    if only:
        return kept[0][0], rejects
    return _with_spans([file for file, _ in kept], [span for _, span in kept if span]), rejects


def _agreed(files: Sequence[AudioFile]) -> tuple[AudioFile, list[str]]:
    """Returns what rows of the same audio say without contradiction, and the fields and labels that they differ in."""
    first = files[0]
    if len(files) == 1:
        return first, []
    said = {name: {getattr(file, name) for file in files} - {""} for name in SAID}
    labels: dict[str, set[str]] = {}
    for file in files:
        for name, value in file.labels.items():
            labels.setdefault(name, set()).add(value)
    agreed: dict[str, Any] = {name: next(iter(values)) if len(values) == 1 else "" for name, values in said.items()}
    differing = [name for found in (said, labels) for name, values in found.items() if len(values) > 1]
    known = {name: next(iter(values)) for name, values in labels.items() if len(values) == 1}
    return dataclasses.replace(first, labels=known, **agreed), differing


def _rejects(rows: Sequence[RecordingRow], differing: Sequence[str]) -> Iterator[Reject]:
    """Yields the rejects of rows of the same audio: all that differ, or all but the first if none does."""
    numbers = ", ".join(str(row.number) for row in rows[:MOST_NUMBERS]) + (" …" if len(rows) > MOST_NUMBERS else "")
    for row in rows if differing else rows[1:]:
        reason, error = "listed_twice", f"repeats or completes row {rows[0].number}"
        if differing:
            reason = "rows_differ"
            error = f"rows {numbers} are of the same audio and differ in {_listed(differing)}, which is left out"
            if not row.has_times:
                error += "; if they have times in other columns, set corpus.columns={begin: NAME, end: NAME}"
        yield reject_file(row.file, "discover", reason, f"row {row.number}: {error}", row=row.number)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _with_spans(files: Sequence[AudioFile], spans: Sequence[Span]) -> AudioFile:
    """Returns a recording with its spans; its speaker, language and split are those common to all its rows."""
    first = files[0]
    speaker = first.speaker if all(file.speaker == first.speaker for file in files) else ""
    language = first.language if all(file.language == first.language for file in files) else ""
    split = first.split if all(file.split == first.split for file in files) else ""
    marked = [
        dataclasses.replace(span, language="" if language else file.language, split="" if split else file.split)
        for file, span in zip(files, spans, strict=True)
    ]
    return dataclasses.replace(
        first,
        speaker=speaker,
        language=language,
        split=split,
        text="",
        labels={},
        image="",
        seconds=0.0,
        spans=sorted_spans(marked),
    )


def _whole_as_span(row: RecordingRow) -> Span:
    """Returns the span of a row without times among rows with times: from 0 (an omitted offset) to its duration."""
    stop = round(row.file.seconds * SAMPLE_RATE) or None
    return Span(0, stop, row.file.speaker, row.file.text, row.file.labels, row=row.number, image=row.file.image)
