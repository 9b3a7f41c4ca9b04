"""Lists the files below a folder or an fsspec URL, with the reason for those that cannot be read."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.retries import StorageReadError, error_text
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url, stamp_of
from data_pipeline.corpora.records import printable


@dataclass(frozen=True)
class Entry:
    """A file below the root, or a folder that cannot be read."""

    path: str
    relative: str
    """Path below the root."""
    size: int = 0
    mtime: str = ""
    problem: str = ""
    """Reason code of its problem; "" for a regular file."""
    error: str = ""
    is_folder: bool = False

    @property
    def file_id(self) -> str:
        """`relative` as valid Unicode."""
        return printable(self.relative)

    @property
    def ending(self) -> str:
        """The ending in lower case with its dot; "" if there is none."""
        return posixpath.splitext(self.file_id)[1].lower()


def list_files(root: str) -> Iterator[Entry]:
    """Lists all files below a folder or URL in a fixed order; links to folders are followed once.

    Raises:
        ConfigError: the folder does not exist.
        StorageReadError: the file system or server cannot list it.
    """
    return _list_url(root) if is_url(root) else _list_folder(root)


def _list_folder(given: str) -> Iterator[Entry]:
    root = Path(given.removeprefix("file://")).expanduser()
    if root.is_file():
        table = root.suffix.lower() in (".tsv", ".csv", ".jsonl", ".json")
        remedy = "read it with corpus=manifest" if table else f"give its folder, {root.parent}"
        raise ConfigError(f"corpus.path={given}: is a file, not a folder; {remedy}")
    if not root.is_dir():
        raise ConfigError(f"corpus.path={given}: there is no such folder")
    # each folder once, so that loops of links end
    seen: set[tuple[int, int]] = set()
    waiting = [(str(root), "")]
    while waiting:
        folder, relative = waiting.pop()
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names = ExternalSort()  # a folder may hold millions of files
            with os.scandir(folder) as entries:
                for entry in entries:
                    names.add(entry.name, None)
        except OSError as error:
            yield Entry(
                folder, relative or ".", problem="unreadable", error=f"folder: {error.strerror}", is_folder=True
            )
            continue
        for name, _ in names:
            path, below = f"{folder.rstrip('/')}/{name}", f"{relative}/{name}" if relative else name
            found = _entry(path, below)
            if found is None:
                waiting.append((path, below))
            else:
                yield found


def _entry(path: str, below: str) -> Entry | None:
    """Returns the entry of a file; None for a folder."""
    try:
        info = os.stat(path)  # noqa: PTH116 (a Path costs more than the call, and corpora have millions of files)
    except FileNotFoundError:
        if os.path.islink(path):  # noqa: PTH114
            return Entry(path, below, problem="broken_link", error="is a link to nothing")
        return Entry(path, below, problem="vanished", error="was removed while the folder was listed")
    except OSError as error:
        return Entry(path, below, problem="broken_link", error=str(error.strerror))
    if stat.S_ISDIR(info.st_mode):
        return None
    if stat.S_ISREG(info.st_mode):
        return Entry(path, below, info.st_size, str(info.st_mtime_ns))
    kinds = {
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a character device": stat.S_ISCHR,
        "a block device": stat.S_ISBLK,
    }
    kind = next((name for name, test in kinds.items() if test(info.st_mode)), "a special file")
    link = "a link to " * os.path.islink(path)  # noqa: PTH114
    return Entry(path, below, problem="not_a_file", error=f"is {link}{kind}, not a file")


def _list_url(url: str) -> Iterator[Entry]:
    try:
        fs, base = fsspec.core.url_to_fs(url)
        base = base.rstrip("/")
        fs.invalidate_cache()
        there = fs.exists(base)
        found = sorted(fs.find(base, detail=True).items()) if there else []
    except (ImportError, ValueError) as error:  # no package for this kind of address, or no such kind
        raise ConfigError(f"corpus.path={url}: cannot be used: {error}") from None
    except Exception as error:  # every protocol of fsspec has its own exceptions
        raise StorageReadError(url, f"cannot be listed: {error_text(error)}") from None
    if not there:
        raise ConfigError(f"corpus.path={url}: there is no such folder")
    for path, info in found:
        size, version = stamp_of(info)
        yield Entry(fs.unstrip_protocol(path), path[len(base) :].lstrip("/"), size, version)
