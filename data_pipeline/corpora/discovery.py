"""Finds the recordings of a corpus. What cannot be used is listed with a reason, never skipped silently."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import AudioFile
from data_pipeline.corpora import layouts
from data_pipeline.corpora.config import ManifestCorpus, PathCorpus
from data_pipeline.corpora.manifest import _from_manifest
from data_pipeline.corpora.records import Discovered, Reject, _remote_stat, printable


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
