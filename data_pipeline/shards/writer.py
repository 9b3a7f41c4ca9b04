"""Shards: plain USTAR tars that any WebDataset reader reads, an index beside each, and a record that it is done.

A shard is data, not code: nothing in it is ever unpickled. Bytes depend on the samples alone (no times, no owners), the
name of a tar carries the start of its sha256, and a reader trusts only what `_done/<unit>.json` names.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.storage import FileStore, write_synced
from data_pipeline.core.types import Segment

BLOCK: Final = 512
REFUSED_SUFFIXES: Final = ("pyd", "pickle", "pkl", "pth", "pt")
"""Members that other readers would unpickle: a shard that holds one is refused."""
AUDIO_SUFFIXES: Final = ("flac", "wav", "opus")
INDEX_SCHEMA: Final = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("payload_offset", pa.int64()),
        ("payload_size", pa.int64()),
        ("suffix", pa.string()),
        ("n_samples", pa.int64()),
        ("corpus", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("file_id", pa.string()),
        ("start", pa.int64()),
        ("level_dbfs", pa.float32()),
        ("snr_db", pa.float32()),
        ("weight", pa.float32()),
    ]
)


@dataclass(frozen=True)
class DoneRecord:
    """`_done/<unit>.json`: one finished unit. `shard` is "" where nothing of the unit was kept."""

    unit: str
    shard: str
    sha256: str
    bytes: int
    index_sha256: str
    segments: int
    samples: int
    """Audio samples in all segments."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Files and segments left out, by reason."""
    files: int = 0
    rejects_sha256: str = ""
    """Of `<unit>.rejects.jsonl`; "" where nothing was left out."""
    flow: tuple[tuple[str, str, str, str, int, int], ...] = ()
    """(corpus, language, stage, reason, count, samples): what came in, what was left out and why, what went out."""

    def to_json(self) -> builtins.bytes:
        """Sorted, so that equal records are equal bytes; `check` is the sha256 of all the rest."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "check": self.check}, sort_keys=True, indent=1).encode() + b"\n"

    @property
    def check(self) -> str:
        """The sha256 of everything that the record says."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_json(text: builtins.bytes, name: str) -> DoneRecord:
        """Unknown fields (of later versions) are ignored. Raises ValueError naming the file."""
        try:
            values = json.loads(text)
            known = {f.name for f in dataclasses.fields(DoneRecord)}
            values = {key: value for key, value in values.items() if key in known}
            values["flow"] = tuple(tuple(row) for row in values.get("flow", ()))
            return DoneRecord(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is no record of a finished unit ({error}); delete it and run preprocessing again"
            ) from None


class ShardWriter:
    """Writes one tar in a scratch folder, together with its index; `finish` closes both.

    `mark` and `rollback` undo the samples of a file that turns out to be broken after its first segments were written.
    """

    def __init__(self, folder: Path) -> None:
        self.tar_path, self.index_path, self.offsets_path = folder / "tar", folder / "parquet", folder / "idx"
        self._file: IO[bytes] = self.tar_path.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()

    def add(self, segment: Segment, suffix: str, audio: bytes, n_samples: int, **extra: Any) -> None:
        """One sample: `<key>.<suffix>`, then `<key>.json`. Raises ValueError for a key that is used up or has a dot."""
        if "." in segment.key or "/" in segment.key or not segment.key.isascii() or len(segment.key) > 90:
            raise ValueError(f"the key {segment.key!r} must be ASCII, at most 90 long, without dots and slashes")
        if segment.key in self._keys:
            raise ValueError(f"the key {segment.key!r} is in the shard already")
        self._keys.add(segment.key)
        offset = self._offset
        payload_offset = self._member(f"{segment.key}.{suffix}", audio)
        self._member(f"{segment.key}.json", sample_json(segment, n_samples, extra))
        row = {
            "key": segment.key,
            "offset": offset,
            "size": self._offset - offset,
            "payload_offset": payload_offset,
            "payload_size": len(audio),
            "suffix": suffix,
            "n_samples": n_samples,
            "corpus": segment.corpus,
            "language": segment.language,
            "speaker": segment.speaker,
            "file_id": segment.file_id,
            "start": segment.start,
            "level_dbfs": extra.get("level_dbfs"),
            "snr_db": extra.get("snr_db"),
            "weight": extra.get("weight", 1.0),
        }
        self._rows.append(row)

    def mark(self) -> tuple[int, int, Any]:
        """The present end, for `rollback`."""
        return self._offset, len(self._rows), self._hash.copy()

    def rollback(self, mark: tuple[int, int, Any]) -> None:
        """Takes back everything since `mark`."""
        self._offset, rows, self._hash = mark
        self._keys -= {row["key"] for row in self._rows[rows:]}
        del self._rows[rows:]
        self._file.seek(self._offset)
        self._file.truncate()

    @property
    def segments(self) -> int:
        """How many samples are in it."""
        return len(self._rows)

    @property
    def samples(self) -> int:
        """How much audio is in it, in audio samples."""
        return sum(row["n_samples"] for row in self._rows)

    def finish(self) -> tuple[str, int]:
        """Closes and syncs tar and indexes; the tar's sha256 and its size in bytes."""
        end = self._offset
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        offsets = np.array([row["offset"] for row in self._rows] + [end], dtype="<u8")
        write_synced(self.offsets_path, offsets.tobytes())
        buffer = io.BytesIO()
        pq.write_table(_index_table(self._rows), buffer, compression="zstd")
        write_synced(self.index_path, buffer.getvalue())
        return self._hash.hexdigest(), self._offset

    def close(self) -> None:
        """Gives up what was not finished."""
        self._file.close()

    def _member(self, name: str, content: bytes) -> int:
        self._write(tar_header(name, len(content)))
        payload_offset = self._offset
        self._write(content)
        self._write(bytes(-len(content) % BLOCK))
        return payload_offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)


def tar_header(name: str, size: int) -> bytes:
    """What `tarfile.TarInfo` makes of an ASCII name of at most 100 bytes, in a fifth of the time."""
    head = bytearray(_HEADER)
    head[: len(name)] = name.encode("ascii")
    head[124:135] = b"%011o" % size
    head[148:156] = b"%06o\0 " % (sum(head) + 8 * ord(" "))
    return bytes(head)


def _blank_header() -> bytes:
    head = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    head[148:156] = bytes(8)  # the checksum
    return bytes(head)


_HEADER: Final = _blank_header()


def _index_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """As `Table.from_pylist`, which imports pandas: that costs a worker more time than a minute of audio."""
    arrays = []
    for column in INDEX_SCHEMA:
        values = [row[column.name] for row in rows]
        valid = pa.py_buffer(
            np.packbits(np.array([value is not None for value in values], bool), bitorder="little").tobytes()
        )
        if column.type == pa.string():
            texts = [value.encode() for value in values]
            ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
        else:
            numbers = np.array([value or 0 for value in values], column.type.to_pandas_dtype())
            buffers = [valid if None in values else None, pa.py_buffer(numbers)]
        arrays.append(pa.Array.from_buffers(column.type, len(rows), buffers))
    return pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)


def sample_json(segment: Segment, n_samples: int, extra: Mapping[str, Any]) -> bytes:
    """The `.json` member of a sample: who speaks, what, and where in the source. `start` counts output samples."""
    labels = {name: value for name, value in segment.labels.items() if value}
    values = {
        "file_id": segment.file_id,
        "corpus": segment.corpus,
        "speaker": segment.speaker,
        "language": segment.language,
        "text": segment.text,
        "start": segment.start,
        "n_samples": n_samples,
        "sample_rate": segment.sample_rate,
        "labels": labels,
        **extra,
    }
    kept = {key: value for key, value in values.items() if value not in ("", {}, None)}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def commit(store: FileStore, writer: ShardWriter, record: DoneRecord, rejects: bytes = b"") -> DoneRecord:
    """Finishes the writer's shard, moves it into place and, last of all, creates `_done/<unit>.json` exclusively.

    Returns the record that stands: another process's, where one was faster.
    """
    sha256, size = writer.finish()
    if writer.segments:
        shard = f"{record.unit}-{sha256[:8]}.tar"
        index_sha256 = hashlib.sha256(writer.index_path.read_bytes()).hexdigest()
        store.put(writer.tar_path, shard)
        store.put(writer.offsets_path, shard + ".idx")
        store.put(writer.index_path, index_name(shard))
        record = dataclasses.replace(record, shard=shard, sha256=sha256, bytes=size, index_sha256=index_sha256)
    if rejects:
        store.replace(rejects_name(record.unit), rejects)
        record = dataclasses.replace(record, rejects_sha256=hashlib.sha256(rejects).hexdigest())
    record = dataclasses.replace(record, segments=writer.segments, samples=writer.samples)
    if store.create(f"_done/{record.unit}.json", record.to_json()):
        return record
    winner = DoneRecord.from_json(store.read(f"_done/{record.unit}.json"), f"_done/{record.unit}.json")
    if record.shard and winner.shard != record.shard:
        for name in (record.shard, record.shard + ".idx", index_name(record.shard)):
            store.remove(name)
    return winner


def index_name(shard: str) -> str:
    """`X.tar` to `X.parquet`."""
    return shard.removesuffix(".tar") + ".parquet"


def rejects_name(unit: str) -> str:
    """Where a unit lists what it left out, one JSON object a line."""
    return f"_rejects/{unit}.jsonl"


def finished_units(root: str) -> list[DoneRecord]:
    """Every finished unit, also those of which nothing was kept, sorted by unit; [] for a folder without any."""
    store = FileStore(root)
    names = store.names("_done", ".json")
    return [DoneRecord.from_json(store.read(f"_done/{name}"), f"{root}/_done/{name}") for name in names]


def done_records(root: str) -> list[DoneRecord]:
    """The finished shards of a data set, sorted by shard name. Raises ValueError where there are none."""
    store = FileStore(root)
    if not store.exists():
        raise ValueError(
            f"there is no shard folder {root}; write one with `auricle preprocess corpus=path corpus.path=FOLDER "
            f"out={root}`"
        )
    records = sorted((record for record in finished_units(root) if record.shard), key=lambda record: record.shard)
    if not records:
        tars = len(store.names("", ".tar"))
        parts = [name for name in ("train", "valid", "test") if store.names(f"{name}/_done", ".json")]
        why = f"it holds {tars} tars but no _done/*.json, by which finished shards are known" if tars else "it is empty"
        why = f"its shards lie in {', '.join(f'{root}/{part}' for part in parts)}" if parts else why
        raise ValueError(f"{root} holds no finished shards: {why}; run `auricle preprocess … out={root}` to its end")
    return records


def read_index(root: str, record: DoneRecord) -> pa.Table:
    """The index of one shard, checked against its record, and the shard's size with it.

    Columns: `INDEX_SCHEMA`. Raises ValueError for an index or tar that is missing, cut short or altered.
    """
    store = FileStore(root)
    name = index_name(record.shard)
    again = f"remove {root}/_done/{record.unit}.json and run preprocessing again to make it anew"
    try:
        content = store.read(name)
        size = store.size(record.shard)
    except FileNotFoundError as error:
        raise ValueError(f"{root}/{record.shard}: the shard or its index is missing ({error}); {again}") from None
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        raise ValueError(f"{root}/{name} is not the index that was written (its sha256 differs); {again}")
    if size != record.bytes:
        raise ValueError(f"{root}/{record.shard} has {size:,} bytes instead of {record.bytes:,}; {again}")
    return pq.read_table(io.BytesIO(content))


def refuse_code(member: str, shard: str) -> None:
    """Raises ValueError for a member that readers of WebDataset would unpickle."""
    if member.rsplit(".", 1)[-1].lower() in REFUSED_SUFFIXES:
        raise ValueError(
            f"{shard}: member {member!r} would be unpickled, which can run code; such shards are refused "
            f"(members ending in {', '.join(REFUSED_SUFFIXES)})"
        )
