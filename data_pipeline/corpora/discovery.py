"""Finds the recordings of a corpus. What cannot be used is listed with a reason, never skipped silently."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora import layouts
from data_pipeline.preprocess.config import ManifestCorpus, PathCorpus


@dataclass(frozen=True)
class Reject:
    """A file or segment that was left out. `samples` at the output rate, 0 where unknown; `start` likewise."""

    path: str
    file_id: str
    corpus: str
    language: str
    stage: str
    reason: str
    error: str = ""
    start: int = 0
    samples: int = 0


@dataclass
class Discovered:
    """The usable files, sorted by `file_id`, and those that are not."""

    files: list[AudioFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def fingerprint(corpus: Any) -> str:
    """A short name for a corpus config."""
    text = json.dumps(dataclasses.asdict(corpus), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def discover(corpus: Any) -> Discovered:
    """The files of a corpus config. Raises ConfigError where the corpus is not there or is empty."""
    found = Discovered()
    if isinstance(corpus, PathCorpus):
        _from_path(corpus, found)
    elif isinstance(corpus, ManifestCorpus):
        _from_manifest(corpus, found)
    else:
        _from_layout(corpus, found)
    _refuse_doubles(found)
    if not found.files and not found.rejects:
        splits = f" in the splits {', '.join(corpus.splits)}" if corpus.splits else ""
        raise ConfigError(
            f"corpus.path={corpus.path}: holds no sound files{splits}; check the path, corpus.extensions and "
            "corpus.splits"
        )
    found.files.sort(key=lambda file: file.file_id)
    return found


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become \\xXX escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _from_path(corpus: PathCorpus, found: Discovered) -> None:
    name = corpus.corpus or PurePosixPath(corpus.path.rstrip("/")).name or "corpus"
    pattern = _compiled(corpus.pattern)
    endings = tuple("." + ending.lower().lstrip(".") for ending in corpus.extensions)
    listing = _list_url(corpus.path) if is_url(corpus.path) else _list_folder(corpus.path)
    for path, relative, size, mtime, error in listing:
        is_folder = error is not None and error[0] == "unreadable"
        if not is_folder and not relative.lower().endswith(endings):
            continue
        file_id = printable(relative)
        if error:
            found.rejects.append(Reject(printable(path), file_id, name, corpus.language, "discover", *error))
            continue
        match = pattern.search(file_id) if pattern else None
        groups = {key: value or "" for key, value in match.groupdict().items()} if match else {}
        if corpus.splits and groups.get("split", "") not in corpus.splits:
            continue
        found.files.append(
            AudioFile(
                path=path,
                file_id=file_id,
                corpus=name,
                speaker=groups.get("speaker", ""),
                language=groups.get("language", "") or corpus.language,
                text=groups.get("text", ""),
                split=groups.get("split", ""),
                size=size,
                mtime=mtime,
            )
        )


def _from_layout(corpus: Any, found: Discovered) -> None:
    if getattr(corpus, "download", False):
        layouts.download(corpus)
    describe = layouts.READERS[corpus.name](corpus)
    listing = _list_url(corpus.path) if is_url(corpus.path) else _list_folder(corpus.path)
    for path, relative, size, mtime, error in listing:
        file_id = printable(relative)
        about = describe(file_id)
        if about is None:
            continue
        if error:
            found.rejects.append(Reject(printable(path), file_id, corpus.name, about.language, "discover", *error))
        elif not corpus.splits or about.split in corpus.splits:
            found.files.append(
                AudioFile(
                    path, file_id, corpus.name, about.speaker, about.language, about.text, about.split, {},
                    about.seconds, size, mtime, about.spans,
                )
            )  # fmt: skip


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"corpus.pattern={pattern!r}: is no regular expression ({error})") from None


Listed = tuple[str, str, int, str, tuple[str, str] | None]
"""(path, path below the root, size, mtime, what is wrong with it as (reason, error))"""


def _list_folder(given: str) -> Iterator[Listed]:
    root = Path(given.removeprefix("file://")).expanduser()
    if not root.is_dir():
        raise ConfigError(f"corpus.path={given}: there is no such folder")
    # follows links to folders, each folder once, so that loops end
    seen: set[tuple[int, int]] = set()
    waiting = [(str(root), "")]
    while waiting:
        folder, relative = waiting.pop()
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, relative or ".", 0, "", ("unreadable", f"folder: {error.strerror}")
            continue
        for entry in ordered:
            below = f"{relative}/{entry.name}" if relative else entry.name
            try:
                if entry.is_dir():
                    waiting.append((entry.path, below))
                elif entry.is_file():
                    info = entry.stat()
                    yield entry.path, below, info.st_size, str(info.st_mtime_ns), None
                elif entry.is_symlink():
                    yield entry.path, below, 0, "", ("broken_link", "is a link to nothing")
            except OSError as error:
                yield entry.path, below, 0, "", ("broken_link", f"{error.strerror}")


def _list_url(url: str) -> Iterator[Listed]:
    fs, base = fsspec.core.url_to_fs(url)
    base = base.rstrip("/")
    fs.invalidate_cache()
    if not fs.exists(base):
        raise ConfigError(f"corpus.path={url}: there is no such folder")
    for path, info in sorted(fs.find(base, detail=True).items()):
        yield fs.unstrip_protocol(path), path[len(base) :].lstrip("/"), *_remote_stat(info), None


def _remote_stat(info: dict[str, Any]) -> tuple[int, str]:
    stamp = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return int(info.get("size") or 0), str(stamp).strip('"')


def stat(path: str) -> tuple[int, str]:
    """(size, mtime) of a file as `discover` notes them. Raises FileNotFoundError."""
    if not is_url(path):
        info = Path(path).stat()
        return info.st_size, str(info.st_mtime_ns)
    fs, remote = fsspec.core.url_to_fs(path)
    fs.invalidate_cache()
    return _remote_stat(fs.info(remote))


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


def _refuse_doubles(found: Discovered) -> None:
    """Two files of one id would give two samples of one key."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for file in found.files:
        if (file.corpus, file.file_id) in seen:
            found.rejects.append(
                Reject(printable(file.path), file.file_id, file.corpus, file.language, "discover", "listed_twice")
            )
        else:
            seen.add((file.corpus, file.file_id))
            kept.append(file)
    found.files = kept
