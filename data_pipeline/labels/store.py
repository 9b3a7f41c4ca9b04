"""Stores frame labels: for each shard X.tar of a data set, X.labels.parquet in a separate folder.

Rows are in the order of the shard's index: `key` and `labels` (list of uint16, one per frame from the segment's first
sample on). `labels.json` has the artefact from which they were computed (e.g. the sha256 of the k-means centres), the
frame rate and the number of classes; every file repeats the artefact, so that labels of different ones are never mixed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.json_object import DamagedFileError, parse_object
from data_pipeline.core.lru import LruCache
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels.features import MFCC_HZ
from data_pipeline.shards.index_rows import INDEX_ERRORS
from data_pipeline.shards.local import Array, ShardError, ShardIndex

AGAIN: Final = "remove it and run `auricle targets` again"
ADDED: Final = {"rate_hz": MFCC_HZ, "silence_db": 0.0}
"""Settings that folders of earlier versions lack, with the values that they had; left out where they have them."""
MOST_CLASSES: Final = 1 << 16
"""Largest number of classes; labels are stored in 16 bits."""


@dataclass(frozen=True)
class LabelMetadata:
    """`labels.json`. rate_hz divides the sample rate; labels are 0 … classes - 1."""

    artefact: str
    rate_hz: int
    classes: int

    @property
    def hop(self) -> int:
        """Audio samples per label."""
        return SAMPLE_RATE // self.rate_hz

    @staticmethod
    def read(root: str) -> LabelMetadata:
        """Reads labels.json of a label folder.

        Raises:
            ConfigError: there is none, or one of its fields is missing or wrong.
            DamagedFileError: it is not a JSON object.
        """
        name = f"{root}/labels.json"
        try:
            values = parse_object(FileStore(root).read("labels.json"))
        except FileNotFoundError:
            raise ConfigError(f"{root} has no frame labels (labels.json is missing); run `auricle targets`") from None
        except ValueError as error:
            raise DamagedFileError(f"{name}: cannot be read as JSON ({error}); {AGAIN}") from None
        known = [field.name for field in fields(LabelMetadata)]
        if unknown := values.keys() - set(known):
            raise ConfigError(f"{name}: unknown field {min(unknown)!r}; the fields are {', '.join(known)}")
        given: dict[str, Any] = {field: values.get(field) for field in known}
        found = LabelMetadata(**given)
        if not isinstance(found.artefact, str) or not found.artefact:
            raise ConfigError(f"{name}: artefact={found.artefact!r} must be a text; {AGAIN}")
        if type(found.rate_hz) is not int or found.rate_hz <= 0 or SAMPLE_RATE % found.rate_hz:
            raise ConfigError(f"{name}: rate_hz={found.rate_hz!r} must be a whole number dividing {SAMPLE_RATE}")
        if type(found.classes) is not int or not 1 <= found.classes <= MOST_CLASSES:
            raise ConfigError(f"{name}: classes={found.classes!r} must be a whole number, 1 to {MOST_CLASSES}")
        return found

    def write(self, root: str) -> None:
        """Writes labels.json into a label folder."""
        FileStore(root).replace("labels.json", json.dumps(asdict(self)).encode() + b"\n")


def file_name(shard: str) -> str:
    """Returns `X.labels.parquet` for `X.tar`."""
    return shard.removesuffix(".tar") + ".labels.parquet"


def write_labels(root: str, shard: str, labels: LabelMetadata, keys: Sequence[str], rows: Sequence[Array]) -> None:
    """Writes the labels of one shard.

    Args:
        root: folder or fsspec URL of the labels.
        shard: name of the shard, X.tar.
        labels: artefact, rate and number of classes.
        keys: keys of the segments, in the order of the shard's index.
        rows: labels of each segment, (F,), 0 to classes - 1.

    Raises:
        ValueError: a label is out of range.
    """
    flat = np.concatenate(rows) if rows else np.zeros(0, np.uint16)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < labels.classes:
        raise ValueError(f"labels of {shard} must be 0 to {labels.classes - 1}, got {flat.min()} to {flat.max()}")
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(np.uint16)))
    table = pa.table({"key": list(keys), "labels": column}).replace_schema_metadata({"artefact": labels.artefact})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    FileStore(root).replace(file_name(shard), buffer.getvalue())


def require_same_settings(store: FileStore, settings: dict[str, Any]) -> None:
    """Records the settings of a label folder.

    Raises:
        ConfigError: it has labels of other ones.
        DamagedFileError: their record is damaged.
    """
    text = json.dumps(settings, sort_keys=True, indent=1).encode() + b"\n"
    if store.create("targets.json", text):
        return
    try:
        before = parse_object(store.read("targets.json"))
    except ValueError as error:
        raise DamagedFileError(
            f"{store.root}/targets.json: cannot be read as JSON ({error}); remove it and give the command again"
        ) from None
    pairs = {key: [found.get(key, ADDED.get(key)) for found in (settings, before)] for key in {**settings, **ADDED}}
    different = [f"{key}={new!r} here, {old!r} there" for key, (new, old) in pairs.items() if new != old]
    if different:
        raise ConfigError(
            f"out={store.root}: holds labels of other settings ({'; '.join(different)}); choose another folder"
        )


class LabelReader:
    """Reads labels by row; the label files of the last `keep` shards are cached. Each process opens its own."""

    def __init__(self, root: str, keep: int) -> None:
        self.root, self.metadata = root, LabelMetadata.read(root)
        self._shards = LruCache[str, tuple[Array, Array]](keep)

    def of(self, shard: str, index: ShardIndex, row: int, start: int, length: int) -> Array:
        """Returns the int64 labels of the frames that begin in samples start … start + length - 1, the first at start.

        Raises ShardError if the labels are missing, of another artefact or of other segments.

        Args:
            shard: name of the shard, X.tar.
            index: its index; the labels must be of the same segments.
            row: the segment's row in it.
            start: first sample, from the segment's start.
            length: number of samples.
        """
        flat, offsets = self._shards.get(shard, lambda: self._load(shard, index))
        first = int(offsets[row]) + start // self.metadata.hop
        last = min(int(offsets[row + 1]), first + -(-length // self.metadata.hop))
        return flat[first:last].astype(np.int64)

    def _load(self, shard: str, index: ShardIndex) -> tuple[Array, Array]:
        name = file_name(shard)
        try:
            table = pq.ParquetFile(io.BytesIO(FileStore(self.root).read(name))).read(use_threads=False)
            artefact = (table.schema.metadata or {}).get(b"artefact", b"").decode()
            keys = table.column("key").cast(pa.string())
            flat, offsets = _flattened(table.column("labels"), self.metadata.classes)
        except INDEX_ERRORS as error:
            raise ShardError(shard, f"its labels {self.root}/{name} cannot be read ({error})") from None
        if artefact != self.metadata.artefact:
            raise ShardError(
                shard, f"its labels are of artefact {artefact!r}, but {self.root} is {self.metadata.artefact!r}"
            )
        if not keys.equals(index.table.column("key").cast(pa.string())):
            raise ShardError(shard, f"its labels in {self.root} are of other segments; run `auricle targets` again")
        return flat, offsets


def _flattened(column: pa.ChunkedArray, classes: int) -> tuple[Array, Array]:
    """Returns all labels of a column and the position of each row's first one, and the end of the last.

    Raises:
        ValueError: it is not a column of lists of labels below `classes`.
    """
    rows = column.combine_chunks()
    if not pa.types.is_list(rows.type) or not pa.types.is_integer(rows.type.value_type):
        raise ValueError(f"labels are {rows.type}, not lists of whole numbers")
    if rows.null_count or rows.values.null_count:
        raise ValueError("labels are null")
    flat = rows.values.to_numpy()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < classes:
        raise ValueError(f"labels are {flat.min()} to {flat.max()}; labels.json has {classes} classes")
    return flat, rows.offsets.to_numpy()


def pad(rows: Sequence[Array]) -> Array:
    """Stacks labels of different lengths: (B, F) int64, padded with -1."""
    out = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
