"""Reads manifests (TSV, CSV, JSON lines, Parquet) into recordings with spans and labels."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.records import Discovered, Reject, printable, stat

COLUMNS: dict[str, tuple[str, ...]] = {
    "path": ("path", "audio_filepath", "audio", "audio_path", "file", "filename", "wav"),
    "speaker": ("speaker", "speaker_id", "spk", "client_id"),
    "language": ("language", "lang", "locale"),
    "text": ("text", "transcript", "sentence", "transcription"),
    "corpus": ("corpus", "dataset", "source"),
    "split": ("split", "subset"),
    "seconds": ("seconds", "duration_s", "duration"),
    "begin": ("begin_s", "begin_time", "start_s", "start_time"),
    "end": ("end_s", "end_time"),
}
"""Names under which a manifest's columns are looked for; every other column becomes a label. A row with begin and end
(in seconds) means that stretch of its file; a file may have several such rows."""


def _from_manifest(corpus: ManifestCorpus, found: Discovered) -> None:
    wrong = sorted(set(corpus.columns) - set(COLUMNS))
    if wrong:
        raise ConfigError(f"corpus.columns.{wrong[0]}: there is no such field; there are: {', '.join(COLUMNS)}")
    root = corpus.root or corpus.path.rpartition("/")[0] or "."
    root = root if is_url(root) else str(Path(root).expanduser().absolute())
    named = corpus.corpus or PurePosixPath(corpus.path).stem
    columns: dict[str, str] = {}
    marked: dict[tuple[str, str], list[tuple[AudioFile, Span]]] = {}
    extra = _labels_beside(corpus)
    for number, row in enumerate(_rows(corpus.path), start=1):
        if number == 1:
            columns = _columns(corpus, row)
        values = {field: str(row.get(column) or "").strip() for field, column in columns.items()}
        if corpus.splits and values.get("split", "") not in corpus.splits:
            continue
        name, language = values.get("corpus") or named, values.get("language") or corpus.language
        file_id = values["path"]
        path, problem = _resolve(root, file_id, corpus.allow_outside)
        size, mtime = 0, ""
        if not problem:
            try:
                size, mtime = stat(path)
            except OSError as error:
                problem = ("vanished", f"row {number}: {error.strerror or 'is not there'}")
            except ValueError as error:
                problem = ("outside_root", f"row {number}: {error}")
        if problem:
            found.rejects.append(Reject(printable(path), printable(file_id), name, language, "discover", *problem))
            continue
        labels = {
            key: str(value)
            for key, value in row.items()
            if key and key not in columns.values() and value not in (None, "")
        } | extra.get(file_id, {})
        file = AudioFile(
            path=path,
            file_id=printable(file_id),
            corpus=name,
            speaker=values.get("speaker", ""),
            language=language,
            text=values.get("text", ""),
            split=values.get("split", ""),
            labels=labels,
            seconds=_seconds(values.get("seconds", "")),
            size=size,
            mtime=mtime,
        )
        span = _span(values, file)
        if span is None:
            found.files.append(file)
        else:
            marked.setdefault((name, file_id), []).append((file, span))
    found.files += [_with_spans(rows) for rows in marked.values()]


def _span(values: dict[str, str], file: AudioFile) -> Span | None:
    """The stretch that a row means; None where it means the whole file."""
    try:
        begin, end = float(values.get("begin") or 0.0), float(values.get("end") or 0.0)
    except ValueError:
        return None
    if not 0 <= begin < end < 1e7:
        return None
    return Span(round(begin * SAMPLE_RATE), round(end * SAMPLE_RATE), file.speaker, file.text, file.labels)


def _with_spans(rows: list[tuple[AudioFile, Span]]) -> AudioFile:
    """One recording of all its rows; its speaker is theirs if they have one in common."""
    spans = sorted((span for _, span in rows), key=lambda span: (span.start, span.stop))
    speakers = {span.speaker for span in spans}
    speaker = speakers.pop() if len(speakers) == 1 else ""
    return dataclasses.replace(rows[0][0], speaker=speaker, text="", labels={}, seconds=0.0, spans=tuple(spans))


def _labels_beside(corpus: ManifestCorpus) -> dict[str, dict[str, str]]:
    """Labels by path from the table `corpus.labels`; the values of several rows of one path are joined by spaces."""
    joined: dict[str, dict[str, list[str]]] = {}
    for row in _rows(corpus.labels, "labels") if corpus.labels else ():
        columns = joined.setdefault(str(row.get("path") or ""), {})
        for name, value in row.items():
            if name and name != "path" and value not in (None, ""):
                columns.setdefault(name, []).append(str(value))
    if corpus.labels and not any(path and columns for path, columns in joined.items()):
        raise ConfigError(f"corpus.labels={corpus.labels}: has no column path beside others")
    return {path: {name: " ".join(values) for name, values in columns.items()} for path, columns in joined.items()}


def _rows(path: str, field: str = "path") -> Iterator[dict[str, Any]]:
    ending = path.rsplit(".", 1)[-1].lower()
    if ending not in ("tsv", "csv", "jsonl", "json"):
        raise ConfigError(f"corpus.{field}={path}: a manifest ends in .tsv, .csv, .jsonl or .json")
    try:
        with fsspec.open(str(Path(path).expanduser()) if not is_url(path) else path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"corpus.{field}={path}: cannot be read as a manifest ({error})") from None
    if ending in ("tsv", "csv"):
        csv.field_size_limit(1 << 30)
        lines = io.StringIO(text, newline="")
        if ending == "tsv":
            yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv.DictReader(lines)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"corpus.{field}={path}: line {number} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"corpus.{field}={path}: line {number} is no JSON object")
        yield row


def _columns(corpus: ManifestCorpus, row: dict[str, Any]) -> dict[str, str]:
    columns = {
        field: next((name for name in names if name in row), "") for field, names in COLUMNS.items()
    } | corpus.columns
    lost = [f"corpus.columns.{field}={name}" for field, name in corpus.columns.items() if name not in row]
    if lost or not columns["path"]:
        what = ", ".join(lost) or "no column of paths: set corpus.columns.path"
        raise ConfigError(f"corpus.path={corpus.path}: {what}; its columns are: {', '.join(map(str, row))}")
    return {field: name for field, name in columns.items() if name}


def _resolve(root: str, given: str, allow_outside: bool) -> tuple[str, tuple[str, str] | None]:
    """The path that a manifest means, or why it may not be read."""
    if not given or "\0" in given:
        return given, ("no_path", "the row names no file")
    if is_url(root) or is_url(given):
        path = given if is_url(given) else f"{root.rstrip('/')}/{given}"
        outside = not path.startswith(root.rstrip("/") + "/") or ".." in PurePosixPath(given).parts
    else:
        path = os.path.normpath(Path(root, given))
        outside = not os.path.realpath(path).startswith(os.path.realpath(root).rstrip("/") + "/")
    if outside and not allow_outside:
        return path, ("outside_root", "lies outside corpus.root; set corpus.allow_outside=true if that is meant")
    return path, None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e7 else 0.0
