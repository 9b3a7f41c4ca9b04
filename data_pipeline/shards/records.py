"""Records of finished shards: the `_done` record, the index table, and the names of both."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore

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
    """The finished shards of a data set, sorted by shard name. Raises ConfigError where there are none."""
    store = FileStore(root)
    if not store.exists():
        raise ConfigError(
            f"there is no shard folder {root}; write one with `auricle preprocess corpus=path corpus.path=FOLDER "
            f"out={root}`"
        )
    records = sorted((record for record in finished_units(root) if record.shard), key=lambda record: record.shard)
    if not records:
        tars = len(store.names("", ".tar"))
        parts = [name for name in ("train", "valid", "test") if store.names(f"{name}/_done", ".json")]
        why = f"it holds {tars} tars but no _done/*.json, by which finished shards are known" if tars else "it is empty"
        why = f"its shards lie in {', '.join(f'{root}/{part}' for part in parts)}" if parts else why
        raise ConfigError(f"{root} holds no finished shards: {why}; run `auricle preprocess … out={root}` to its end")
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
