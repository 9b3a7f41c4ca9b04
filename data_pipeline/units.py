"""Plans the work: which recordings make up which shard, decided once and frozen on disk.

`_plan/0000.sha256`, `0001.sha256` … in the data set each name a table of recordings by unit. They are created
exclusively, so two jobs at once agree on one plan; a later job adds one for recordings that are new and leaves the
older ones alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.files import FileStore
from data_pipeline.preprocess_config import PreprocessConfig, content_settings
from data_pipeline.schema import ConfigError
from data_pipeline.types import SAMPLE_RATE, AudioFile

WRITER_VERSION: Final = 1
"""Part of every unit's name; raise it when the same input gives other bytes."""
BYTES_PER_SECOND: Final = {"flac": 18_000, "wav": 32_000, "opus": 4_000}
"""Of a shard, for planning; FLAC as measured on read speech."""
SECONDS_PER_BYTE: Final = {
    **dict.fromkeys(("wav", "aif", "aiff", "caf", "au", "sph", "w64", "rf64"), 1 / 32_000),
    "flac": 1 / 18_000,
    **dict.fromkeys(("mp3", "m4a", "aac", "wma"), 1 / 8_000),
    **dict.fromkeys(("opus", "ogg", "webm", "amr"), 1 / 4_000),
}
PLAN_SCHEMA: Final = pa.schema(
    [
        ("unit", pa.string()),
        ("path", pa.binary()),
        *((name, pa.string()) for name in ("file_id", "corpus", "speaker", "language", "text", "split", "labels")),
        ("seconds", pa.float64()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """The recordings of one shard."""

    name: str
    files: tuple[AudioFile, ...]


@dataclass
class Plan:
    """All units of a data set, in the order of their names, and what was found when planning."""

    units: list[Unit] = field(default_factory=list)
    new_files: int = 0
    changed_files: list[AudioFile] = field(default_factory=list)
    """Recordings that are in a unit already but have since changed on disk; they are left as they are."""

    def expected_seconds(self) -> float:
        """Hours of audio to come, roughly: from the corpus where it says, otherwise from file sizes."""
        return sum(expected_seconds(file) for unit in self.units for file in unit.files)


def expected_seconds(file: AudioFile) -> float:
    """Duration as far as it is known without opening the file."""
    return file.seconds or file.size * SECONDS_PER_BYTE.get(file.path.rsplit(".", 1)[-1].lower(), 1 / 16_000)


def freeze_plan(store: FileStore, files: Sequence[AudioFile], config: PreprocessConfig, dry: bool = False) -> Plan:
    """The plan with `files` added as far as they are new; `dry` writes nothing.

    Raises ConfigError where the folder holds shards of other settings.
    """
    _check_settings(store, config, dry)
    while True:
        plan, generations = read_plan(store)
        fresh = _new_files(plan, files)
        if not fresh:
            return plan
        units = group(fresh, config)
        if dry or _claim(store, generations, _plan_bytes(units)):
            plan.units = sorted([*plan.units, *units], key=lambda unit: unit.name)
            plan.new_files = len(fresh)
            return plan


def read_plan(store: FileStore) -> tuple[Plan, int]:
    """What is planned so far, and in how many generations. Raises ValueError for a plan that was altered."""
    names = store.names("_plan", ".sha256")
    units = []
    for name in names:
        sha256 = store.read(f"_plan/{name}").decode().strip()
        content = store.read(f"_plan/{sha256[:16]}.parquet")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{store.root}/_plan/{sha256[:16]}.parquet is not as it was written")
        units += _read_units(content)
    return Plan(sorted(units, key=lambda unit: unit.name)), len(names)


def group(files: Iterable[AudioFile], config: PreprocessConfig) -> list[Unit]:
    """Units of about `shard_mb`, each a random mix of the recordings: they are ordered by the hash of their name."""
    ordered = sorted(files, key=lambda file: (_hash(file.corpus, file.file_id), file.file_id))
    sizes = [expected_seconds(file) * BYTES_PER_SECOND[config.codec] for file in ordered]
    limit = min(config.shard_mb * 1e6, max(sum(sizes) / config.min_shards, 1e6))
    settings = json.dumps(content_settings(config), sort_keys=True)
    units, start, held = [], 0, 0.0
    for number, size in enumerate(sizes):
        if number > start and held + size > limit:
            units.append(_unit(ordered[start:number], settings))
            start, held = number, 0.0
        held += size
    if ordered:
        units.append(_unit(ordered[start:], settings))
    return units


def _claim(store: FileStore, generation: int, content: bytes) -> bool:
    sha256 = hashlib.sha256(content).hexdigest()
    store.replace(f"_plan/{sha256[:16]}.parquet", content)
    return store.create(f"_plan/{generation:04d}.sha256", sha256.encode() + b"\n")


def _unit(files: Sequence[AudioFile], settings: str) -> Unit:
    sources = [f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}" for file in files]
    return Unit(_hash(str(WRITER_VERSION), settings, *sources), tuple(files))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _new_files(plan: Plan, files: Iterable[AudioFile]) -> list[AudioFile]:
    known = {(file.corpus, file.file_id): file for unit in plan.units for file in unit.files}
    fresh = []
    for file in files:
        before = known.get((file.corpus, file.file_id))
        if before is None:
            fresh.append(file)
        elif (before.size, before.mtime) != (file.size, file.mtime):
            plan.changed_files.append(file)
    return fresh


def _check_settings(store: FileStore, config: PreprocessConfig, dry: bool) -> None:
    """`dataset.json` holds the settings that all shards of a folder share."""
    wanted = {"format": WRITER_VERSION, "sample_rate": SAMPLE_RATE, "codec": config.codec}
    wanted["settings"] = json.loads(json.dumps(content_settings(config)))
    text = dataset_json(wanted)
    if not store.exists("dataset.json") and (dry or store.create("dataset.json", text)):
        return
    found = json.loads(store.read("dataset.json"))
    different = [
        f"{path}={new!r} here, {old!r} there"
        for path, new, old in _differences(wanted["settings"], found.get("settings", {}))
    ]
    if found.get("format") != WRITER_VERSION:
        different.append(f"format {WRITER_VERSION} here, {found.get('format')} there")
    if different:
        raise ConfigError(
            f"out={store.root}: holds shards of other settings ({'; '.join(different)}); "
            "choose the same settings or another folder"
        )


def dataset_json(values: dict[str, Any]) -> bytes:
    """`dataset.json` of these values, with a checksum of them."""
    plain = {key: value for key, value in values.items() if key != "check"}
    check = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, "check": check}, indent=1, sort_keys=True).encode() + b"\n"


def _differences(new: Any, old: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        return [
            found
            for key in sorted(new.keys() | old.keys())
            for found in _differences(new.get(key), old.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if new == old else [(path, new, old)]


def _plan_bytes(units: Sequence[Unit]) -> bytes:
    rows = [
        {
            "unit": unit.name,
            "path": os.fsencode(file.path),
            "labels": json.dumps(dict(file.labels), sort_keys=True),
            **{
                name: getattr(file, name)
                for name in ("file_id", "corpus", "speaker", "language", "text", "split", "seconds", "size", "mtime")
            },
        }
        for unit in units
        for file in unit.files
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _read_units(content: bytes) -> list[Unit]:
    units: dict[str, list[AudioFile]] = {}
    for row in pq.read_table(io.BytesIO(content)).to_pylist():
        name = row.pop("unit")
        row["path"], row["labels"] = os.fsdecode(row["path"]), json.loads(row["labels"])
        units.setdefault(name, []).append(AudioFile(**row))
    return [Unit(name, tuple(files)) for name, files in units.items()]
