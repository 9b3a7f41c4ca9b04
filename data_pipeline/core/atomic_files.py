"""Writes and removes files atomically and durably, and computes their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` atomically: after a crash, and for readers, it has either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as indented JSON, atomically."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_secret(path: Path) -> None:
    """Writes 256 random bits, in hexadecimal, to a new file that only its owner reads. Raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(secrets.token_hex(32))


def remove(path: Path) -> None:
    """Removes a folder, complete or not, ignoring errors."""
    shutil.rmtree(path, ignore_errors=True)


def sha256_of(source: Path | IO[bytes]) -> str:
    """Returns the sha256, in hexadecimal, of a file, or of the unread rest of an open file."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return sha256_of(file)
    return hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]


def write_synced(path: Path, content: bytes) -> None:
    """Writes a local file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
