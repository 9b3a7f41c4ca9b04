"""Records of corpus discovery: the recordings found and the rejected inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.core.storage import is_url
from data_pipeline.core.types import AudioFile


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


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become \\xXX escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
