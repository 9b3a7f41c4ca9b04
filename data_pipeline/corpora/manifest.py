"""Reads manifests (TSV, CSV, JSON lines) into recordings with spans and labels.

Each row becomes a recording, a span of one, or a reject with its row number.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.lru import LruCache
from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.columns import COLUMNS, ColumnNames
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.manifest_paths import PathRule
from data_pipeline.corpora.recording_rows import PlainEntry, RecordingRow, join_rows, whole_row
from data_pipeline.corpora.recordings import Order, order_of, row_of
from data_pipeline.corpora.records import Discovered, Reject, printable, reject_file, stat
from data_pipeline.corpora.tables import TableRow, as_text, read_table

REMEDY: Final = (
    "set corpus.columns={begin: NAME, end: NAME} or {begin: NAME, seconds: NAME}, for samples or frames also "
    'corpus.units_per_second; {begin: ""} takes whole files and {end: ""} takes all from the begin on'
)
"""What to do about times in unknown columns."""
MOST_LOCATED: Final = 10_000
"""Files whose place is remembered, since rows of one recording are mostly neighbours."""
LONGEST_SECONDS: Final = 1e7
"""Longest plausible time in seconds; larger values must be in another unit."""

CHANNELS: Final[dict[str, int | None]] = {
    "a": 0, "b": 1, "left": 0, "right": 1, "l": 0, "r": 1, "average": None, "mean": None, "mix": None, "all": None,
}  # fmt: skip
"""Names of channels; None: the mean of all of them."""


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


def discover_manifest(corpus: ManifestCorpus, found: Discovered) -> None:
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
        self.names = ColumnNames(corpus.columns, corpus.units_per_second)
        self.seen: dict[str, None] = {}
        self._shapes: set[tuple[str, ...]] = set()
        self.has_path = self.has_begin = self.has_part = False
        self.unread: dict[str, None] = {}
        self.extra = _labels_beside(corpus)
        self._located: LruCache[str, _Located | RowError] = LruCache(MOST_LOCATED)
        self._paths = PathRule(self.root, outside=corpus.allow_outside)
        self._entries = ExternalSort(found.recordings.folder)

    def add(self, row: TableRow) -> None:
        """Adds or rejects one row."""
        shape = tuple(row.values)
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.seen |= dict.fromkeys(shape)
        columns = self.names.of(row.values)
        self.has_path |= "path" in columns
        values = {field: row.values[column] for field, column in columns.items()}
        text = {field: as_text(value) for field, value in values.items() if not _is_nan(value)}
        if self.corpus.splits and not row.problem and text.get("split", "") not in self.corpus.splits:
            return
        name, language = text.get("corpus") or self.named, text.get("language") or self.corpus.language
        given = text.get("path", "")
        try:
            if row.problem:
                raise RowError("bad_row", row.problem)
            self._require_known_times(row, columns)
            at = self._locate(given)
            times = self._times(columns, values)
            file = AudioFile(
                path=at.path,
                file_id=at.file_id,
                corpus=name,
                speaker=text.get("speaker", ""),
                language=language,
                text=text.get("text", ""),
                split=text.get("split", ""),
                labels=self._labels(row, columns, given, at.file_id),
                seconds=self._length(columns, values),
                size=at.size,
                mtime=at.mtime,
                image=self._image(text.get("image", "")),
            )
            entry = RecordingRow(file, _span(times, values, file, row.number), row.number, bool(times))
        except RowError as error:
            path, file_id = self._paths.place(given)
            if error.reason in ("outside_root", "no_path", "bad_row"):
                file_id = given
            file = AudioFile(path, printable(file_id), name, language=language)
            problem = f"row {row.number}: {error}"
            self.found.rejects.append(reject_file(file, "discover", error.reason, problem, row=row.number))
            return
        self._entries.add(order_of(name, at.file_id), entry.plain())

    def finish(self) -> None:
        """Joins the rows of each recording.

        Raises:
            ConfigError: a column is in no row, times are in unknown columns, or parts begin but none has an end.
        """
        chosen = self.corpus.columns.items()
        lost = [f"corpus.columns.{field}={name}" for field, name in chosen if name and name not in self.seen]
        problem = ", ".join(lost)
        if not self.has_path and not lost:
            problem = f"no column of paths, such as {', '.join(COLUMNS['path'][:4])}: set corpus.columns={{path: NAME}}"
        elif self.unread and not self.has_part and not lost:
            problem = f"the times in {', '.join(self.unread)} are in no known column: {REMEDY}"
        elif not self.has_part and not lost and self.corpus.columns.get("end") != "":
            problem = self._endless()
        if self.seen and problem:
            raise ConfigError(f"corpus.path={self.corpus.path}: {problem}; its columns are: {', '.join(self.seen)}")
        repeated: list[tuple[int, list[Reject]]] = []
        for order, entries in self._joined():
            if len(entries) == 1 and (plain := whole_row(entries[0])):
                self.found.recordings.add(plain, entries[0][0], order)
                continue
            file, rejects = join_rows([RecordingRow.from_plain(entry) for entry in entries])
            self.found.recordings.add(row_of(file), entries[0][0], order)
            repeated += [(entries[0][0], rejects)] if rejects else []
        repeated.sort(key=lambda found: found[0])
        self.found.rejects += [reject for _, rejects in repeated for reject in rejects]

    def _joined(self) -> Iterator[tuple[Order, list[PlainEntry]]]:
        """Yields the rows of each recording."""
        for order, same in itertools.groupby(self._entries, key=operator.itemgetter(0)):
            yield order, [entry for _, entry in same]

    def _endless(self) -> str:
        """Returns the problem of a table without any end that has several beginnings in one file; "" for others."""
        found: tuple[int, str] | None = None
        if not self.has_begin:
            return ""
        for _, plain in self._joined():
            entries = [RecordingRow.from_plain(entry) for entry in plain]
            begins: dict[int, int] = {e.span.start: e.number for e in entries if e.span and e.has_times}
            if len(begins) > 1 and (found is None or entries[0].number < found[0]):
                numbers = " and ".join(str(number) for number in list(begins.values())[:2])
                where = f"rows {numbers} of {entries[0].file.file_id}"
                found = entries[0].number, f"no row has an end, and {where} would overlap: {REMEDY}"
        return found[1] if found else ""

    def _require_known_times(self, row: TableRow, columns: Mapping[str, str]) -> None:
        """Raises RowError for a row whose begin or end is in a column that no field reads."""
        if unread := self.names.unread_times(row.values, columns):
            self.unread |= dict.fromkeys(unread)
            raise RowError("unread_times", f"the times in {', '.join(unread)} are in no known column: {REMEDY}")

    def _times(self, columns: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, float]:
        """Returns begin and end of a row in seconds, as far as it has them. Raises RowError."""
        times = {field: self._seconds(field, columns, values) for field in ("begin", "end") if field in values}
        if (
            "begin" in times
            and "end" not in times
            and "seconds" in values
            and not self.names.is_whole(columns["seconds"])
        ):
            length = self._seconds("seconds", columns, values)
            times["end"] = times["begin"] + length
            if length == -1:  # like the end, as some tools write for the rest of the recording
                times["end"] = -1
        self.has_begin |= "begin" in times
        self.has_part |= "end" in times
        return times

    def _seconds(self, field: str, columns: Mapping[str, str], values: Mapping[str, Any]) -> float:
        number = self.names.seconds(columns[field], values[field])
        if not math.isfinite(number):
            raise RowError("bad_span", f"{columns[field]}={as_text(values[field])} is not a number or a clock time")
        return number

    def _length(self, columns: Mapping[str, str], values: Mapping[str, Any]) -> float:
        """Returns the stated length of a recording in seconds; 0 if it is unknown."""
        seconds = self.names.seconds(columns["seconds"], values["seconds"]) if "seconds" in values else 0.0
        return seconds if 0 < seconds < LONGEST_SECONDS else 0.0

    def _labels(self, row: TableRow, columns: Mapping[str, str], given: str, file_id: str) -> dict[str, str]:
        used = set(columns.values())
        own = {key: as_text(value) for key, value in row.values.items() if key and key not in used and value != ""}
        return own | (self.extra.get(file_id) or self.extra.get(given) or {})

    def _locate(self, given: str) -> _Located:
        """Returns the file that a row names. Raises RowError if it does not exist or must not be read."""
        known = self._located.get(given, lambda: self._look_up(given))
        if isinstance(known, RowError):
            raise known
        return known

    def _look_up(self, given: str) -> _Located | RowError:
        if not given or "\0" in given:
            return RowError("no_path", "names no file")
        path, file_id = self._paths.place(given)
        if self._paths.refuses(path):
            return RowError("outside_root", "is outside of corpus.root; set corpus.allow_outside=true to accept it")
        try:
            return _Located(path, printable(file_id), *stat(path))
        except FileNotFoundError:
            return RowError("vanished", "there is no such file")
        except StorageReadError as error:
            return RowError("read_error", error.reason)
        except ValueError as error:
            return RowError("no_path", f"is not a path ({error})")

    def _image(self, given: str) -> str:
        """Returns the path of an image; whether it can be read is found out when it is. Raises RowError."""
        if not given:
            return ""
        if "\0" in given:
            raise RowError("no_path", "its image is not a path")
        path, _ = self._paths.place(given)
        if self._paths.refuses(path):
            raise RowError(
                "outside_root", "its image is outside of corpus.root; set corpus.allow_outside=true to accept it"
            )
        return path


def _span(times: Mapping[str, float], values: Mapping[str, Any], file: AudioFile, row: int) -> Span | None:
    """Returns the span of a row; None if the row selects the whole file. Raises RowError for an invalid span."""
    channel = _channel(values["channel"]) if "channel" in values else None
    if not times:
        return (
            None
            if channel is None
            else Span(0, None, file.speaker, file.text, file.labels, channel=channel, row=row, image=file.image)
        )
    begin, end = times.get("begin", 0.0), times.get("end")
    if end == -1:  # Kaldi's notation for the end of the recording
        end = None
    if not 0 <= begin < LONGEST_SECONDS or (end is not None and not begin < end < LONGEST_SECONDS):
        raise RowError("bad_span", f"begins at {begin:g} s and ends at {'the end' if end is None else f'{end:g} s'}")
    start, stop = round(begin * SAMPLE_RATE), None if end is None else round(end * SAMPLE_RATE)
    if stop is not None and stop <= start:
        raise RowError("bad_span", f"begins at {begin:g} s and ends at {end:g} s: that holds no sample")
    return Span(start, stop, file.speaker, file.text, file.labels, channel=channel, row=row, image=file.image)


def _channel(value: Any) -> int | None:
    """Returns a channel number from 0, where A, B, left and right are 0 and 1; None for the mean of all channels."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    text = as_text(one).lower().removeprefix("[").removesuffix("]").strip()
    if text in CHANNELS:
        return CHANNELS[text]
    if not re.fullmatch(r"\d{1,6}(?:\.0*)?", text, re.ASCII):
        raise RowError(
            "bad_channel",
            f"channel={as_text(value)} is not a channel number from 0, A, B, left, right or average; "
            'corpus.columns={channel: ""} leaves the column out',
        )
    return int(float(text))


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
