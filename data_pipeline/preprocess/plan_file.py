"""Tables of planned recordings on disk: `_plan/<sha256>.parquet`, one per generation of a plan."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.types import AudioFile, Span

SPLITS: Final = ("train", "valid", "test")
TEXTS: Final = ("file_id", "corpus", "speaker", "language", "text", "split")
PLAN_SCHEMA: Final = pa.schema(
    [
        ("unit", pa.string()),
        ("folder", pa.string()),
        ("dropped", pa.string()),
        ("same_as", pa.string()),
        ("path", pa.binary()),
        *((name, pa.string()) for name in (*TEXTS, "labels")),
        ("seconds", pa.float64()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
        ("spans", pa.string()),
        ("share", pa.float64()),
        ("offset", pa.float64()),
        ("samples", pa.int64()),
        ("image", pa.binary()),
    ]
)
"""Columns; dropped, same_as, share, offset and samples are set for duplicates. Earlier versions lack the last four."""


@dataclass(frozen=True)
class WorkUnit:
    """The recordings of one shard."""

    name: str
    files: tuple[AudioFile, ...]
    split: str = ""
    """Folder of the shard below `out`: train, valid, test, or "" for `out` itself."""


@dataclass(frozen=True)
class Dropped:
    """A duplicate, which is in no unit."""

    file: AudioFile
    reason: str
    """exact or near."""
    same_as: str
    """corpus/file_id of the recording that is kept."""
    share: float = 1.0
    """Shared part of the shorter recording's speech."""
    offset_seconds: float = 0.0
    """Start of this recording in the kept one; negative if it begins earlier."""
    samples: int = 0
    """Its length at the output rate; 0 if it is unknown."""


def write_unit_table(units: Iterable[WorkUnit], dropped: Iterable[Dropped]) -> bytes:
    """Returns the Parquet bytes of one generation."""
    rows = [{**_row(file), "unit": unit.name, "folder": unit.split} for unit in units for file in unit.files]
    rows += [
        {
            **_row(drop.file),
            "dropped": drop.reason,
            "same_as": drop.same_as,
            "share": drop.share,
            "offset": drop.offset_seconds,
            "samples": drop.samples,
        }
        for drop in dropped
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_unit_table(content: bytes) -> tuple[list[WorkUnit], list[Dropped]]:
    """Reads one generation. Raises ValueError if it is damaged or contains a name that is not plain."""
    units: dict[tuple[str, str], list[AudioFile]] = {}
    dropped = []
    for row in pq.ParquetFile(io.BytesIO(content)).read(use_threads=False).to_pylist():
        file = _file(row)
        if row["dropped"]:
            more = {"share": row.get("share"), "offset_seconds": row.get("offset"), "samples": row.get("samples")}
            known = {name: value for name, value in more.items() if value is not None}
            dropped.append(Dropped(file, row["dropped"], row["same_as"], **known))
        else:
            units.setdefault((row["unit"], row["folder"]), []).append(file)
    for name, folder in units:
        if not re.fullmatch(r"[0-9a-f]{16}", name) or folder not in ("", *SPLITS):
            raise ValueError(f"unit {name!r} of folder {folder!r}: not a name that a plan gives")
    return [WorkUnit(name, tuple(files), folder) for (name, folder), files in units.items()], dropped


def spans_json(file: AudioFile) -> str:
    """Returns the spans of a recording as JSON, "" without any; fields with their default value are omitted."""
    return json.dumps([_span_values(span) for span in file.spans], sort_keys=True) if file.spans else ""


def _span_values(span: Span) -> dict[str, Any]:
    # the first five fields are always written, since names of units depend on them
    always = ("start", "stop", "speaker", "text", "labels")
    values = dataclasses.asdict(span)
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(span)
        if field.name in always or values[field.name] != field.default
    }


def _row(file: AudioFile) -> dict[str, Any]:
    return {
        "unit": "",
        "folder": "",
        "dropped": "",
        "same_as": "",
        "path": os.fsencode(file.path),
        "file_id": file.file_id,
        "corpus": file.corpus,
        "speaker": file.speaker,
        "language": file.language,
        "text": file.text,
        "split": file.split,
        "labels": json.dumps(dict(file.labels), sort_keys=True),
        "seconds": file.seconds,
        "size": file.size,
        "mtime": file.mtime,
        "spans": spans_json(file),
        "image": os.fsencode(file.image),
    }


def _file(row: Mapping[str, Any]) -> AudioFile:
    return AudioFile(
        path=os.fsdecode(row["path"]),
        **{name: row[name] for name in TEXTS},
        labels=json.loads(row["labels"]),
        seconds=row["seconds"],
        size=row["size"],
        mtime=row["mtime"],
        spans=tuple(Span(**span) for span in json.loads(row.get("spans") or "[]")),
        image=os.fsdecode(row.get("image") or b""),
    )
