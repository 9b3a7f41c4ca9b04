"""Records of corpus discovery: recordings, rejected inputs, and counts of skipped files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec

from data_pipeline.core.retries import StorageReadError, error_text
from data_pipeline.core.storage import is_url, stamp_of
from data_pipeline.core.types import AudioFile, Span
from data_pipeline.corpora.recordings import Recordings

RecordingId = tuple[str, str]
"""(corpus, file_id), which identifies a recording in a data set."""


@dataclass(frozen=True)
class Reject:
    """A rejected recording, row of a table, or segment."""

    path: str
    file_id: str
    corpus: str
    language: str
    stage: str
    """discover, decode, vad, cut, filter, image or unit; only the image is left out in the stage image."""
    reason: str
    """Short code, counted in reports."""
    error: str = ""
    start: int = 0
    """First sample, at the output rate."""
    samples: int = 0
    """Length at the output rate; 0 if it is unknown."""
    row: int = 0
    """Row of the table that names it, from 1; 0 without a table."""
    recording: bool = False
    """True for exactly one reject of each recording without a kept segment."""

    @property
    def recording_id(self) -> RecordingId:
        """(corpus, file_id)."""
        return self.corpus, self.file_id


@dataclass
class Discovered:
    """The usable recordings of a corpus, which may be more than fit into memory, and its unusable inputs."""

    recordings: Recordings = field(default_factory=Recordings)
    rejects: list[Reject] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files that are not recordings, by ending (".txt"; "" for none)."""
    warnings: list[str] = field(default_factory=list)
    licences: dict[str, set[str]] = field(default_factory=dict)
    """Licences by corpus, from columns `licence` and `license`."""

    @property
    def files(self) -> list[AudioFile]:
        """The recordings in memory, sorted by `file_id`; for small corpora."""
        return sorted(self.recordings.in_place(), key=lambda file: file.file_id)


def recording_id(file: AudioFile) -> RecordingId:
    """Returns (corpus, file_id) of a recording."""
    return file.corpus, file.file_id


def sorted_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorts spans by start, end, channel and row; spans without an end come last."""
    return tuple(sorted(spans, key=lambda span: (span.start, span.stop or 1 << 62, span.channel or 0, span.row)))


def reject_file(file: AudioFile, stage: str, reason: str, error: str = "", **more: Any) -> Reject:
    """Returns the reject of a recording or of a part of it.

    Args:
        file: the recording.
        stage: where it is rejected, such as discover or decode.
        reason: short name of the reason, by which rejects are counted.
        error: the message.
        **more: further fields of `Reject`.
    """
    path = file.path if is_url(file.path) else printable(file.path)
    return Reject(
        path=path,
        file_id=file.file_id,
        corpus=file.corpus,
        language=file.language,
        stage=stage,
        reason=reason,
        error=error,
        **more,
    )


def reject_from_json(values: Mapping[str, Any]) -> Reject:
    """Reads a row of a rejects file; rows of earlier versions may lack fields.

    Raises:
        ValueError: the row has unknown fields.
    """
    try:
        return Reject(**values)
    except TypeError as error:
        raise ValueError(f"not a row of rejects: {error}") from None


def printable(name: str) -> str:
    """Returns a file name as valid Unicode: bytes that are not UTF-8 become \\xXX escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stat(path: str) -> tuple[int, str]:
    """Returns (size, modification time or version) of a local file or URL.

    Raises:
        FileNotFoundError: the file does not exist.
        StorageReadError: its existence cannot be determined: access denied, an I/O error, HTTP 500.
        ValueError: the path is not valid.
    """
    if not is_url(path):
        try:
            info = os.stat(path)  # noqa: PTH116 (a Path costs more than the call, and corpora have millions of files)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageReadError(path, f"cannot be read: {error_text(error)}") from None
        return info.st_size, str(info.st_mtime_ns)
    try:
        fs, remote = fsspec.core.url_to_fs(path)
        fs.invalidate_cache()
        return stamp_of(fs.info(remote))
    except FileNotFoundError:
        raise
    except Exception as error:  # every protocol of fsspec has its own exceptions
        raise StorageReadError(path, f"cannot be read: {error_text(error)}") from None
