"""Folders of tars that an index in another folder may name: those that this user indexed, or that a config lists.

A data set from elsewhere could otherwise make a run read any folder, or connect to any server.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.storage import FileStore


def _file() -> Path:
    """Returns the list of the folders that this user indexed: a JSON text per line."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "auricle" / "indexed_tars.jsonl"


def _indexed() -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError, RuntimeError):  # no home folder
        for line in _file().read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                place = json.loads(line)
                found |= {place} if isinstance(place, str) else set()
    return found


def remember(location: str) -> None:
    """Adds the folder of tars that this user indexes; does nothing without a home folder that can be written."""
    with contextlib.suppress(OSError, RuntimeError):
        if location not in _indexed():
            _file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _file().open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(location)}\n")  # after a torn line, too


def refusal(location: str, listed: Sequence[str] = ()) -> str:
    """Returns why the tars of an index must not be read from another folder; "" if they may.

    Nothing is read there, and the location is compared as a text alone.

    Args:
        location: the folder or URL in a record; "": that of the record.
        listed: folders or URLs that the config allows (`data.tars`).
    """
    if not location or location in _indexed() or location in {FileStore(place).root for place in listed}:
        return ""
    return (
        f"its record places its tar in {location[:200]!r}, which this user has not indexed; if you trust it, set "
        "data.tars=[FOLDER], or give `auricle shards index FOLDER index_out=INDEX` once"
    )
