"""Writes shards: plain USTAR tars for any WebDataset reader, an index for each, and a record of its completion.

A shard is data, not code: nothing in it is ever unpickled. Its bytes depend on the samples only (no times, no owners),
the name of a tar contains the start of its sha256, and readers use only tars that `_done/<unit>.json` names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.retries import write_errors
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import Segment
from data_pipeline.shards.records import INDEX_SCHEMA, DoneRecord, index_name, rejects_name

BLOCK: Final = 512


class ShardWriter:
    """Writes one tar and its index in a scratch folder; `finish` closes both.

    `mark` and `rollback` remove the samples of a file that turns out to be damaged after its first segments.
    """

    def __init__(self, folder: Path) -> None:
        self.tar_path, self.index_path, self.offsets_path = folder / "tar", folder / "parquet", folder / "idx"
        self._file: IO[bytes] = self.tar_path.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()

    def add(
        self, segment: Segment, suffix: str, audio: bytes, n_samples: int, image: bytes = b"", **extra: Any
    ) -> None:
        """Adds one sample: `<key>.<suffix>`, `<key>.png` if it has an image, then `<key>.json`.

        Args:
            segment: key, labels and position in the source.
            suffix: codec of `audio`: flac, wav or opus.
            audio: encoded 16 kHz mono audio.
            n_samples: its length in samples.
            image: a PNG, or b"".
            extra: further fields of the JSON, such as level_dbfs, snr_db and weight.

        Raises:
            ValueError: the key is in the shard already, or has dots, slashes or non-ASCII characters.
            StorageWriteError: the scratch folder cannot be written.
        """
        if "." in segment.key or "/" in segment.key or not segment.key.isascii() or len(segment.key) > 90:
            raise ValueError(f"the key {segment.key!r} must be ASCII, at most 90 long, without dots and slashes")
        if segment.key in self._keys:
            raise ValueError(f"the key {segment.key!r} is in the shard already")
        self._keys.add(segment.key)
        offset = self._offset
        payload_offset = self._member(f"{segment.key}.{suffix}", audio)
        if image:
            self._member(f"{segment.key}.png", image)
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
            "text_length": len(segment.text),
        }
        self._rows.append(row)

    def mark(self) -> tuple[int, int, Any]:
        """Returns the current end, for `rollback`."""
        return self._offset, len(self._rows), self._hash.copy()

    def rollback(self, mark: tuple[int, int, Any]) -> None:
        """Removes all samples that were added after `mark`."""
        self._offset, rows, self._hash = mark
        self._keys -= {row["key"] for row in self._rows[rows:]}
        del self._rows[rows:]
        self._file.seek(self._offset)
        self._file.truncate()

    @property
    def segments(self) -> int:
        """Number of segments in the shard so far."""
        return len(self._rows)

    @property
    def samples(self) -> int:
        """Audio samples in the shard so far."""
        return sum(row["n_samples"] for row in self._rows)

    def finish(self) -> tuple[str, int]:
        """Closes and syncs tar and indexes; returns the tar's sha256 and its size in bytes."""
        end = self._offset
        self._write(bytes(2 * BLOCK))
        offsets = np.array([row["offset"] for row in self._rows] + [end], dtype="<u8")
        buffer = io.BytesIO()
        pq.write_table(_index_table(self._rows), buffer, compression="zstd")
        with write_errors(str(self.tar_path)):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            write_synced(self.offsets_path, offsets.tobytes())
            write_synced(self.index_path, buffer.getvalue())
        return self._hash.hexdigest(), self._offset

    def close(self) -> None:
        """Closes the file of an abandoned shard."""
        self._file.close()

    def _member(self, name: str, content: bytes) -> int:
        self._write(tar_header(name, len(content)))
        payload_offset = self._offset
        self._write(content)
        self._write(bytes(-len(content) % BLOCK))
        return payload_offset

    def _write(self, content: bytes) -> None:
        with write_errors(str(self.tar_path)):
            self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)


def tar_header(name: str, size: int) -> bytes:
    """Returns the same header as `tarfile.TarInfo` for an ASCII name of at most 100 bytes, five times as fast."""
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
    """Returns the same as `Table.from_pylist`, without its import of pandas, which is slow."""
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
    """Returns the `.json` member of a sample: labels and position in the source; `start` counts output samples."""
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
    """Finishes the writer's shard, moves it to its place and finally creates `_done/<unit>.json` exclusively.

    Args:
        store: the data set.
        writer: the writer with the samples; its scratch folder is on the same disk as a local data set.
        record: the unit's record without the fields that depend on the shard's bytes.
        rejects: JSON lines of the rejects.

    Returns:
        The record in `_done`, which is another process's if that was faster.

    Raises:
        StorageWriteError: the data set cannot be written.
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
