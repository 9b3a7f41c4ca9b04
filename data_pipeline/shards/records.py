"""Records of finished shards: the `_done` record, the index table, and their file names."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.packed_files import read_folder
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_plain_name
from data_pipeline.shards.index_rows import INDEX_ERRORS, validate_index
from data_pipeline.shards.places import refusal

REFUSED_SUFFIXES: Final = ("pyd", "pickle", "pkl", "pth", "pt")
"""Suffixes of members that other readers would unpickle; shards with such members are refused."""


AUDIO_SUFFIXES: Final = ("flac", "wav", "opus")
"""Suffixes of audio members that auricle writes."""


WILDCARDS: Final = frozenset("*?[")
"""Characters that make a path a pattern."""


SMALLEST_SAMPLE: Final = 1024
"""Size of the smallest sample in a tar in bytes: one header and one block of audio."""
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
        ("text_length", pa.int32()),
    ]
)


@dataclass(frozen=True)
class DoneRecord:
    """`_done/<unit>.json`: a finished unit of work and its shard."""

    unit: str
    shard: str
    """Name of the tar; "" if all of the unit was rejected."""
    sha256: str
    bytes: int
    index_sha256: str
    segments: int
    samples: int
    """Audio samples in all segments."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Number of rejected files and segments, by reason."""
    files: int = 0
    rejects_sha256: str = ""
    """sha256 of `<unit>.rejects.jsonl`; "" without rejects."""
    flow: tuple[tuple[str, str, str, str, int, int], ...] = ()
    """(corpus, language, stage, reason, count, samples): input, rejects by reason, and output."""
    location: str = ""
    """Folder or URL of the tar where it is not beside its index."""
    root: str = field(default="", compare=False)
    """Folder or URL in which the record was found; not stored."""
    refused: str = field(default="", compare=False)
    """Why `location` must not be read; "" if it may; not stored."""

    @property
    def tar_root(self) -> str:
        """Folder or URL of the tar."""
        return self.root if self.refused else self.location or self.root

    def to_json(self) -> builtins.bytes:
        """Returns JSON with sorted keys, so that equal records have equal bytes, and `check`, their sha256."""
        return json.dumps({**self._values(), "check": self.check}, sort_keys=True, indent=1).encode() + b"\n"

    @property
    def check(self) -> str:
        """Returns the sha256 of all fields."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["root"], values["refused"]
        if not self.location:  # as records were before there was this field
            del values["location"]
        return values

    @staticmethod
    def from_json(text: builtins.bytes, name: str) -> DoneRecord:
        """Reads a record; unknown fields (of later versions) are ignored.

        Args:
            text: content of the file.
            name: path of the file, whose name must be that of the unit.

        Raises:
            ValueError: the file is not a valid record; the message names it.
        """
        try:
            values = json.loads(text)
            known = {f.name for f in dataclasses.fields(DoneRecord)} - {"root", "refused"}
            values = {key: value for key, value in values.items() if key in known}
            values["flow"] = tuple(tuple(row) for row in values.get("flow", ()))
            record = DoneRecord(**values)
            _check_record(record, name.rpartition("/")[2])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{name} is not a record of a finished unit ({error}); delete it and run preprocessing again"
            ) from None
        return record


def _check_record(record: DoneRecord, file_name: str) -> None:
    """Raises ValueError for a record with invalid values, before its names and sizes are used."""
    if not is_plain_name(record.unit) or file_name != f"{record.unit}.json":
        raise ValueError(f"unit={record.unit!r} is not the name of the file")
    if record.shard != "" and not (is_plain_name(record.shard) and record.shard.endswith(".tar")):
        raise ValueError(f"shard={record.shard!r} is not the name of a tar")
    values = dataclasses.asdict(record)
    for field_name in ("sha256", "index_sha256", "rejects_sha256", "location"):
        if not isinstance(values[field_name], str):
            raise ValueError(f"{field_name}={values[field_name]!r} is not a text")
    for field_name in ("bytes", "segments", "samples", "files"):
        value = values[field_name]
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{field_name}={value!r} is not a count")
    if record.shard and record.segments * SMALLEST_SAMPLE > record.bytes:
        raise ValueError(f"segments={record.segments} do not fit into bytes={record.bytes}")


def index_name(shard: str) -> str:
    """Returns `X.parquet` for `X.tar`."""
    return shard.removesuffix(".tar") + ".parquet"


def rejects_name(unit: str) -> str:
    """Returns the name of the JSON-lines file of a unit's rejects."""
    return f"_rejects/{unit}.jsonl"


def placed(record: DoneRecord, root: str, tars: Sequence[str] = ()) -> DoneRecord:
    """Returns a record with the folder in which it was found, and whether its tar may be read from another one.

    Args:
        record: as it was read.
        root: folder or URL of the data set.
        tars: folders or URLs that `location` may name, beside those that this user indexed.
    """
    return dataclasses.replace(record, root=root, refused=refusal(record.location, tars))


def finished_units(root: str, tars: Sequence[str] = ()) -> list[DoneRecord]:
    """Returns all finished units, including those without a shard, sorted by unit; [] if there are none.

    Args:
        root: folder or URL of the data set.
        tars: see `placed`.
    """
    found = (
        DoneRecord.from_json(content, f"{root}/_done/{name}")
        for name, content in read_folder(FileStore(root), "_done", ".json")
    )
    return [placed(record, root, tars) for record in found]


def done_records(shards: str | Sequence[str], tars: Sequence[str] = ()) -> list[DoneRecord]:
    """Returns the finished shards of a data set, sorted by shard name, wherever they are.

    Args:
        shards: Folder or fsspec URL of the data set, or several; `*`, `?` and `[…]` stand for all folders that match.
        tars: Folders or URLs of tars that an index may name, beside those that this user indexed.

    Raises:
        ConfigError: One of them has none, or two hold the same shard.
        ValueError: A record is damaged, or two records of a folder name one shard.
        StorageReadError: The storage does not answer.
    """
    records = sorted(
        (record for root in shard_folders(shards) for record in _records_of(root, tars)),
        key=lambda record: (record.shard, record.sha256),
    )
    for one, other in itertools.pairwise(records):
        if (one.shard, one.sha256) == (other.shard, other.sha256):
            raise ConfigError(
                f"data.shards: {one.root} and {other.root} both hold the shard {one.shard}, which would be read twice; "
                "leave one of them out"
            )
    return records


def shard_folders(shards: str | Sequence[str]) -> list[str]:
    """Returns the folders and URLs that `shards` names, without patterns and repetitions.

    Raises:
        ConfigError: A pattern matches no folder with finished shards.
    """
    named = [shards] if isinstance(shards, str) else shards
    return list(dict.fromkeys(root for part in named for root in _matching(part)))


def _matching(root: str) -> list[str]:
    """Returns `root`, or the folders with finished shards that a pattern matches; raises ConfigError for none."""
    if not WILDCARDS & set(root):
        return [root]
    found = FileStore(root.rstrip("/")).matching_folders("_done")
    if not found:
        raise ConfigError(f"data.shards={root}: no folder with finished shards matches; shards are folders with _done/")
    return found


def _records_of(root: str, tars: Sequence[str]) -> list[DoneRecord]:
    """Returns the finished shards in one folder, sorted by name; see `done_records`."""
    store = FileStore(root)
    if not store.exists():
        raise ConfigError(
            f"there is no shard folder {root}; write one with `auricle preprocess corpus=path corpus.path=FOLDER "
            f"out={root}`"
        )
    if store.is_file():
        raise ConfigError(f"{root}: is a file; give the folder of the shards, with _done/ in it")
    records = sorted((record for record in finished_units(root, tars) if record.shard), key=lambda one: one.shard)
    if not records:
        count = len(store.names("", ".tar"))
        parts = [name for name in ("train", "valid", "test") if store.names(f"{name}/_done", ".json")]
        why = (
            f"it holds {count} tars but no _done/*.json, by which finished shards are known" if count else "it is empty"
        )
        why = f"its shards are in {', '.join(f'{root}/{part}' for part in parts)}" if parts else why
        raise ConfigError(f"{root} holds no finished shards: {why}; run `auricle preprocess … out={root}` to its end")
    for one, other in itertools.pairwise(records):
        if one.shard == other.shard:
            raise ValueError(
                f"{root}/_done: {one.unit}.json and {other.unit}.json both name {one.shard}; "
                "delete the wrong one, or the shard would be read twice"
            )
    return records


def read_index(root: str, record: DoneRecord) -> pa.Table:
    """Returns the index of one shard, after comparing index and tar with the record.

    Args:
        root: folder or fsspec URL of the index.
        record: the shard's record.

    Returns:
        A table with the columns of `INDEX_SCHEMA`.

    Raises:
        ValueError: index or tar is missing, truncated or altered, or a row of the index is invalid; or the record
            places the tar in a folder that is not allowed.
    """
    if record.refused:
        raise ValueError(f"{root}/{record.shard}: {record.refused}")
    store = FileStore(root)
    tars = FileStore(record.location) if record.location else store
    name = index_name(record.shard)
    again = f"remove {root}/_done/{record.unit}.json and run preprocessing again to write it again"
    try:
        content = store.read(name)
        size = tars.size(record.shard)
    except FileNotFoundError as error:
        raise ValueError(f"{root}/{record.shard}: the shard or its index is missing ({error}); {again}") from None
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        raise ValueError(f"{root}/{name}: checksum mismatch (its sha256 differs); {again}")
    if size != record.bytes:
        raise ValueError(f"{tars.root}/{record.shard} has {size:,} bytes instead of {record.bytes:,}; {again}")
    try:
        table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)
        validate_index(table, record.bytes)
    except INDEX_ERRORS as error:
        raise ValueError(f"{root}/{name}: {error}; {again}") from None
    return table


def refuse_code(member: str, shard: str) -> None:
    """Raises ValueError for a member that WebDataset readers would unpickle."""
    if member.rsplit(".", 1)[-1].lower() in REFUSED_SUFFIXES:
        raise ValueError(
            f"{shard}: member {member!r} would be unpickled, which can run code; such shards are refused "
            f"(members ending in {', '.join(REFUSED_SUFFIXES)})"
        )
