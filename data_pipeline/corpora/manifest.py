"""Reads manifests (TSV, CSV, JSON lines) into recordings with spans and labels.

Each row becomes a recording, a span of one, or a reject with its row number.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.records import (
    Discovered,
    RecordingId,
    printable,
    reject_file,
    sorted_spans,
    stat,
)
from data_pipeline.corpora.tables import Row, as_text, read_table

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "path": ("path", "audio_filepath", "audio", "audio_path", "file", "filename", "wav"),
    "speaker": ("speaker", "speaker_id", "spk", "client_id"),
    "language": ("language", "lang", "locale"),
    "text": ("text", "transcript", "sentence", "transcription"),
    "corpus": ("corpus", "dataset", "source"),
    "split": ("split", "subset"),
    "seconds": ("seconds", "duration_s", "duration"),
    "begin": ("begin_s", "begin_time", "begin", "start_s", "start_time", "start", "offset_s", "offset"),
    "end": ("end_s", "end_time", "end", "stop_s", "stop_time", "stop"),
    "image": ("image", "image_path", "image_filepath"),
    "channel": ("channel", "channel_id", "channel_selector"),
}
"""Names of a manifest's columns, looked up row by row; every other column becomes a label. Begin (in seconds), end or
duration of a row select a part of its file, and channel a channel. Image names a picture of what is said."""
LONGEST_SECONDS: Final = 1e7
"""Longest plausible time in seconds; larger values must be in another unit."""


class RowError(ValueError):
    """Raised for a row that cannot be used; `reason` is a short code for reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class _Located:
    """A file that a row names."""

    path: str
    file_id: str
    """Its normalised path below the root."""
    size: int = 0
    mtime: str = ""


@dataclass(frozen=True)
class _Entry:
    """A usable row: its file, with the row's metadata, and the part that it selects."""

    file: AudioFile
    span: Span | None
    row: int


def read_manifest(corpus: ManifestCorpus, found: Discovered) -> None:
    """Adds the recordings and rejects of a manifest to `found`.

    Raises:
        ConfigError: the table cannot be read or lacks a column that the config names.
    """
    wrong = sorted(set(corpus.columns) - set(COLUMNS))
    if wrong:
        raise ConfigError(f"corpus.columns.{wrong[0]}: there is no such field; there are: {', '.join(COLUMNS)}")
    reader = ManifestReader(corpus, found)
    for row in read_table(corpus.path, "corpus.path"):
        reader.add(row)
    reader.finish()


class ManifestReader:
    """Joins rows into recordings: call `add` for each row, then `finish`.

    Args:
        corpus: Names of columns, root of the paths, and defaults.
        found: Gets recordings and rejects.
    """

    def __init__(self, corpus: ManifestCorpus, found: Discovered) -> None:
        self.corpus, self.found = corpus, found
        root = corpus.root or corpus.path.rpartition("/")[0] or "."
        self.root = root.rstrip("/") if is_url(root) else str(Path(root).expanduser().absolute())
        self.named = corpus.corpus or PurePosixPath(corpus.path).stem
        self.names = {
            field: (corpus.columns[field],) if field in corpus.columns else COLUMNS[field] for field in COLUMNS
        }
        self.seen: dict[str, None] = {}
        self.extra = _labels_beside(corpus)
        self.located: dict[str, _Located | RowError] = {}
        self.entries: dict[RecordingId, list[_Entry]] = {}

    def add(self, row: Row) -> None:
        """Adds or rejects one row."""
        self.seen |= dict.fromkeys(row.values)
        columns = self._columns(row)
        values = {field: row.values[column] for field, column in columns.items()}
        text = {field: as_text(value) for field, value in values.items() if not _is_nan(value)}
        if self.corpus.splits and not row.problem and text.get("split", "") not in self.corpus.splits:
            return
        name, language = text.get("corpus") or self.named, text.get("language") or self.corpus.language
        given = text.get("path", "")
        try:
            if row.problem:
                raise RowError("bad_row", row.problem)
            at = self._locate(given)
            file = AudioFile(
                path=at.path,
                file_id=at.file_id,
                corpus=name,
                speaker=text.get("speaker", ""),
                language=language,
                text=text.get("text", ""),
                split=text.get("split", ""),
                labels=self._labels(row, columns, given, at.file_id),
                seconds=_duration(values.get("seconds")),
                size=at.size,
                mtime=at.mtime,
                image=self._image(text.get("image", "")),
            )
            entry = _Entry(file, _span(values, file, row.number), row.number)
        except RowError as error:
            path, file_id = _place(self.root, given)
            if error.reason in ("outside_root", "no_path", "bad_row"):
                file_id = given
            file = AudioFile(path, printable(file_id), name, language=language)
            problem = f"row {row.number}: {error}"
            self.found.rejects.append(reject_file(file, "discover", error.reason, problem, row=row.number))
            return
        self.entries.setdefault((name, at.file_id), []).append(entry)

    def finish(self) -> None:
        """Joins the rows of each recording. Raises ConfigError if a column is in no row."""
        lost = [
            f"corpus.columns.{field}={name}" for field, name in self.corpus.columns.items() if name not in self.seen
        ]
        no_path = not any(name in self.seen for name in self.names["path"])
        if self.seen and (lost or no_path):
            problem = ", ".join(lost) or "no column of paths: set corpus.columns.path"
            raise ConfigError(f"corpus.path={self.corpus.path}: {problem}; its columns are: {', '.join(self.seen)}")
        for entries in self.entries.values():
            self.found.files.append(self._joined(entries))

    def _columns(self, row: Row) -> dict[str, str]:
        """Returns the column of each field for which the row has a value."""
        found = (
            (field, next((name for name in names if name in row.values), "")) for field, names in self.names.items()
        )
        return {field: name for field, name in found if name}

    def _labels(self, row: Row, columns: Mapping[str, str], given: str, file_id: str) -> dict[str, str]:
        used = set(columns.values())
        own = {key: as_text(value) for key, value in row.values.items() if key and key not in used and value != ""}
        return own | (self.extra.get(file_id) or self.extra.get(given) or {})

    def _locate(self, given: str) -> _Located:
        """Returns the file that a row names. Raises RowError if it does not exist or must not be read."""
        if given not in self.located:
            try:
                self.located[given] = self._look_up(given)
            except RowError as error:
                self.located[given] = error
        known = self.located[given]
        if isinstance(known, RowError):
            raise known
        return known

    def _look_up(self, given: str) -> _Located:
        if not given or "\0" in given:
            raise RowError("no_path", "names no file")
        path, file_id = _place(self.root, given)
        if not self.corpus.allow_outside and _is_outside(self.root, path):
            raise RowError("outside_root", "is outside of corpus.root; set corpus.allow_outside=true to accept it")
        try:
            return _Located(path, printable(file_id), *stat(path))
        except FileNotFoundError:
            raise RowError("vanished", "there is no such file") from None
        except StorageReadError as error:
            raise RowError("read_error", error.reason) from None
        except ValueError as error:
            raise RowError("no_path", f"is not a path ({error})") from None

    def _image(self, given: str) -> str:
        """Returns the path of an image; whether it can be read is found out when it is. Raises RowError."""
        if not given:
            return ""
        if "\0" in given:
            raise RowError("no_path", "its image is not a path")
        path, _ = _place(self.root, given)
        if not self.corpus.allow_outside and _is_outside(self.root, path):
            raise RowError(
                "outside_root", "its image is outside of corpus.root; set corpus.allow_outside=true to accept it"
            )
        return path

    def _joined(self, entries: Sequence[_Entry]) -> AudioFile:
        """Joins all rows of a recording; repeated rows are rejected."""
        only = entries[0].span is None and all(entry.span is None for entry in entries)
        kept: dict[object, tuple[_Entry, Span | None]] = {}
        for entry in entries:
            span = None if only else entry.span or _whole_as_span(entry)
            key = span and (span.start, span.stop, span.channel, entry.file.speaker, entry.file.text)
            if key in kept:
                error = f"row {entry.row}: means the same as row {kept[key][0].row}"
                self.found.rejects.append(reject_file(entry.file, "discover", "listed_twice", error, row=entry.row))
            else:
                kept[key] = entry, span
        files = [entry.file for entry, _ in kept.values()]
        if only:
            return files[0]
        return _with_spans(files, [span for _, span in kept.values() if span])


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


def _span(values: Mapping[str, Any], file: AudioFile, row: int) -> Span | None:
    """Returns the span of a row; None if the row selects the whole file. Raises RowError for an invalid span."""
    channel = _channel(values["channel"]) if "channel" in values else None
    times = {field: _seconds(field, values[field]) for field in ("begin", "end") if field in values}
    if not times:
        return (
            None
            if channel is None
            else Span(0, None, file.speaker, file.text, file.labels, channel=channel, row=row, image=file.image)
        )
    begin, end = times.get("begin", 0.0), times.get("end")
    if end == -1:  # Kaldi's notation for the end of the recording
        end = None
    elif end is None and "seconds" in values:
        end = begin + _seconds("duration", values["seconds"])
    if not 0 <= begin < LONGEST_SECONDS or (end is not None and not begin < end < LONGEST_SECONDS):
        raise RowError("bad_span", f"begins at {begin:g} s and ends at {'the end' if end is None else f'{end:g} s'}")
    start, stop = round(begin * SAMPLE_RATE), None if end is None else round(end * SAMPLE_RATE)
    if stop is not None and stop <= start:
        raise RowError("bad_span", f"begins at {begin:g} s and ends at {end:g} s: that holds no sample")
    return Span(start, stop, file.speaker, file.text, file.labels, channel=channel, row=row, image=file.image)


def _whole_as_span(entry: _Entry) -> Span:
    """Returns the span of a row without times among rows with times: from 0 (an omitted offset) to its duration."""
    stop = round(entry.file.seconds * SAMPLE_RATE) or None
    return Span(0, stop, entry.file.speaker, entry.file.text, entry.file.labels, row=entry.row, image=entry.file.image)


def _seconds(field: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("bad_span", f"{field}={as_text(value)} is not a number of seconds")
    return number


def _duration(value: Any) -> float:
    """Returns the stated length of a recording in seconds; 0 if it is unknown."""
    try:
        seconds = _seconds("seconds", value)
    except RowError:
        return 0.0
    return seconds if 0 < seconds < LONGEST_SECONDS else 0.0


def _channel(value: Any) -> int:
    """Returns a channel number from 0; A and B are 0 and 1."""
    text = as_text(value).upper()
    if text in ("A", "B"):
        return "AB".index(text)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(min(number, 1e6)):
        raise RowError("bad_channel", f"channel={as_text(value)} is not a channel number from 0, A or B")
    return int(number)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _labels_beside(corpus: ManifestCorpus) -> dict[str, dict[str, str]]:
    """Returns labels by path from the table `corpus.labels`; values of several rows of a path are joined by spaces."""
    joined: dict[str, dict[str, list[str]]] = {}
    for row in read_table(corpus.labels, "corpus.labels") if corpus.labels else ():
        columns = joined.setdefault(os.path.normpath(as_text(row.values.get("path", ""))), {})
        for name, value in row.values.items():
            if name and name != "path" and value != "":
                columns.setdefault(name, []).append(as_text(value))
    if corpus.labels and not any(path != "." and columns for path, columns in joined.items()):
        raise ConfigError(f"corpus.labels={corpus.labels}: needs a column path and at least one other")
    return {path: {name: " ".join(values) for name, values in columns.items()} for path, columns in joined.items()}


def _place(root: str, given: str) -> tuple[str, str]:
    """Returns (absolute path or URL, path relative to the root), both normalised."""
    if is_url(root) or is_url(given):
        path = _normal_url(given if is_url(given) else f"{root}/{given}")
        below = path.removeprefix(f"{root}/")
        return path, below
    path = os.path.normpath(Path(root, given.removeprefix("file://")))
    return path, os.path.relpath(path, root) if given and "\0" not in given else given


def _normal_url(url: str) -> str:
    """Returns a URL without `.` and `..` segments in its path."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    host, *segments = rest.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            kept[-1:] = []
        elif segment != ".":
            kept.append(segment)
    return f"{scheme}://{'/'.join([host, *kept])}{mark}{query}"


def _is_outside(root: str, path: str) -> bool:
    if is_url(path):
        return not path.startswith(root + "/")
    return not os.path.realpath(path).startswith(os.path.realpath(root).rstrip("/") + "/")
