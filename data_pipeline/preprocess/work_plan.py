"""Plans the work: which recordings make up which shard, decided once and frozen on disk.

`_plan/0000.sha256`, `0001.sha256` … in the data set each name a table of recordings by unit. They are created
exclusively, so two jobs at once agree on one plan; a later job adds one for recordings that are new and leaves the
older ones alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.integrity import with_check
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.preprocess.config import PreprocessConfig, content_settings

SPLITS: Final = ("train", "valid", "test")
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
        ("folder", pa.string()),
        ("dropped", pa.string()),
        ("same_as", pa.string()),
        ("path", pa.binary()),
        *((name, pa.string()) for name in ("file_id", "corpus", "speaker", "language", "text", "split", "labels")),
        ("seconds", pa.float64()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
        ("spans", pa.string()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """The recordings of one shard."""

    name: str
    files: tuple[AudioFile, ...]
    split: str = ""
    """Folder below `out` that the shard goes to: train, valid, test, or "" for `out` itself."""


@dataclass(frozen=True)
class Dropped:
    """A recording that goes into no unit, since `same_as` (corpus/file_id) holds the same; `reason`: exact or near."""

    file: AudioFile
    reason: str
    same_as: str


@dataclass
class Plan:
    """All units of a data set, in the order of their names, and what was found when planning."""

    units: list[Unit] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    changed_files: list[AudioFile] = field(default_factory=list)
    """Recordings that are in a unit already but have since changed on disk; they are left as they are."""

    def expected_seconds(self) -> float:
        """Hours of audio to come, roughly: from the corpus where it says, otherwise from file sizes."""
        return sum(expected_seconds(file) for unit in self.units for file in unit.files)


def expected_seconds(file: AudioFile) -> float:
    """Duration as far as it is known without opening the file."""
    return file.seconds or file.size * SECONDS_PER_BYTE.get(file.path.rsplit(".", 1)[-1].lower(), 1 / 16_000)


FindDoubles = Callable[[Sequence[AudioFile], "Plan"], Sequence[Dropped]]
"""(new recordings, the plan so far) to those of the new ones that are to be left out."""


def freeze_plan(
    store: FileStore,
    files: Sequence[AudioFile],
    config: PreprocessConfig,
    dry: bool = False,
    find_doubles: FindDoubles | None = None,
) -> Plan:
    """The plan with `files` added as far as they are new; `dry` writes nothing.

    Raises ConfigError where the folder holds shards of other settings.
    """
    _check_settings(store, config, dry)
    while True:
        plan, generations = read_plan(store)
        fresh = _new_files(plan, files)
        if not fresh:
            return plan
        dropped = list(find_doubles(fresh, plan)) if find_doubles else []
        left_out = {(drop.file.corpus, drop.file.file_id) for drop in dropped}
        units = group([file for file in fresh if (file.corpus, file.file_id) not in left_out], config)
        if dry or _claim(store, generations, _plan_bytes(units, dropped)):
            plan.units = sorted([*plan.units, *units], key=lambda unit: unit.name)
            plan.dropped += dropped
            return plan


def read_plan(store: FileStore) -> tuple[Plan, int]:
    """What is planned so far, and in how many generations. Raises ValueError for a plan that was altered."""
    names, plan = store.names("_plan", ".sha256"), Plan()
    for name in names:
        sha256 = store.read(f"_plan/{name}").decode().strip()
        content = store.read(f"_plan/{sha256[:16]}.parquet")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{store.root}/_plan/{sha256[:16]}.parquet is not as it was written")
        _read_into(plan, content)
    plan.units.sort(key=lambda unit: unit.name)
    return plan, len(names)


def set_roots(config: PreprocessConfig) -> list[str]:
    """The data sets that a job writes: `out`, or its folders train, valid and test."""
    return [f"{config.out.rstrip('/')}/{split}" for split in SPLITS] if config.split.enabled else [config.out]


def set_root(config: PreprocessConfig, unit: Unit) -> str:
    """The data set that a unit belongs to."""
    return f"{config.out.rstrip('/')}/{unit.split}" if unit.split else config.out


def split_of(file: AudioFile, config: PreprocessConfig) -> str:
    """Which set a recording goes to: by its speaker, so that new recordings follow the old ones."""
    if not config.split.enabled:
        return ""
    draw = keyed_seed(config.split.seed, file.corpus, file.speaker or f"file {file.file_id}", "split") / 2**63
    if draw < config.split.valid:
        return "valid"
    return "test" if draw < config.split.valid + config.split.test else "train"


def group(files: Iterable[AudioFile], config: PreprocessConfig) -> list[Unit]:
    """Units of about `shard_mb`, each a random mix of the recordings: they are ordered by the hash of their name."""
    sets: dict[str, list[AudioFile]] = {}
    for file in sorted(files, key=lambda file: (_hash(file.corpus, file.file_id), file.file_id)):
        sets.setdefault(split_of(file, config), []).append(file)
    return [unit for split in sorted(sets) for unit in _group_set(sets[split], split, config)]


def _group_set(ordered: Sequence[AudioFile], split: str, config: PreprocessConfig) -> list[Unit]:
    sizes = [expected_seconds(file) * BYTES_PER_SECOND[config.codec] for file in ordered]
    limit = min(config.shard_mb * 1e6, max(sum(sizes) / config.min_shards, 1e6))
    settings = json.dumps(content_settings(config), sort_keys=True)
    units, start, held = [], 0, 0.0
    for number, size in enumerate(sizes):
        if number > start and held + size > limit:
            units.append(_unit(ordered[start:number], split, settings))
            start, held = number, 0.0
        held += size
    units.append(_unit(ordered[start:], split, settings))
    return units


def _claim(store: FileStore, generation: int, content: bytes) -> bool:
    sha256 = hashlib.sha256(content).hexdigest()
    store.replace(f"_plan/{sha256[:16]}.parquet", content)
    return store.create(f"_plan/{generation:04d}.sha256", sha256.encode() + b"\n")


def _unit(files: Sequence[AudioFile], split: str, settings: str) -> Unit:
    sources = [f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}{_spans_json(file)}" for file in files]
    return Unit(_hash(str(WRITER_VERSION), settings, *sources), tuple(files), split)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _new_files(plan: Plan, files: Iterable[AudioFile]) -> list[AudioFile]:
    planned = [file for unit in plan.units for file in unit.files] + [drop.file for drop in plan.dropped]
    known = {(file.corpus, file.file_id): file for file in planned}
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
    text = with_check(wanted)
    if not store.exists("dataset.json") and (dry or store.create("dataset.json", text)):
        return
    found = json.loads(store.read("dataset.json"))
    # a field that is younger than the data set had its default then
    before = _merged(_default_settings(), found.get("settings", {}))
    different = [f"{path}={new!r} here, {old!r} there" for path, new, old in _differences(wanted["settings"], before)]
    if found.get("format") != WRITER_VERSION:
        different.append(f"format {WRITER_VERSION} here, {found.get('format')} there")
    if different:
        raise ConfigError(
            f"out={store.root}: holds shards of other settings ({'; '.join(different)}); "
            "choose the same settings or another folder"
        )


def _default_settings() -> Any:
    return json.loads(json.dumps(content_settings(PreprocessConfig(out="-", corpus=None))))


def _merged(default: Any, given: Any) -> Any:
    if isinstance(default, dict) and isinstance(given, dict):
        return {key: _merged(default.get(key), given.get(key, default.get(key))) for key in default | given}
    return given


def _differences(new: Any, old: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        return [
            found
            for key in sorted(new.keys() | old.keys())
            for found in _differences(new.get(key), old.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if new == old else [(path, new, old)]


def _plan_bytes(units: Sequence[Unit], dropped: Sequence[Dropped]) -> bytes:
    rows = [_plan_row(file, unit.name, unit.split) for unit in units for file in unit.files]
    rows += [_plan_row(drop.file, "", "", drop.reason, drop.same_as) for drop in dropped]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _spans_json(file: AudioFile) -> str:
    return json.dumps([dataclasses.asdict(span) for span in file.spans], sort_keys=True) if file.spans else ""


def _plan_row(file: AudioFile, unit: str, folder: str, dropped: str = "", same_as: str = "") -> dict[str, Any]:
    same = ("file_id", "corpus", "speaker", "language", "text", "split", "seconds", "size", "mtime")
    return {
        "unit": unit,
        "folder": folder,
        "dropped": dropped,
        "same_as": same_as,
        "path": os.fsencode(file.path),
        "labels": json.dumps(dict(file.labels), sort_keys=True),
        "spans": _spans_json(file),
        **{name: getattr(file, name) for name in same},
    }


def _read_into(plan: Plan, content: bytes) -> None:
    units: dict[tuple[str, str], list[AudioFile]] = {}
    for row in pq.read_table(io.BytesIO(content)).to_pylist():
        unit, dropped, same_as = (row.pop("unit"), row.pop("folder")), row.pop("dropped"), row.pop("same_as")
        spans = tuple(Span(**span) for span in json.loads(row.pop("spans", "") or "[]"))
        file = AudioFile(
            **{**row, "path": os.fsdecode(row["path"]), "labels": json.loads(row["labels"]), "spans": spans}
        )
        if dropped:
            plan.dropped.append(Dropped(file, dropped, same_as))
        else:
            units.setdefault(unit, []).append(file)
    plan.units += [Unit(name, tuple(files), folder) for (name, folder), files in units.items()]
