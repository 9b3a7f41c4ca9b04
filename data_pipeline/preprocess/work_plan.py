"""Plans the work: assigns recordings to shards, once, and stores the assignment on disk.

`_plan/0000.sha256`, `0001.sha256` … in the data set each name a table of recordings by unit. They are created
exclusively, so that concurrent jobs use the same plan. A later job adds one for recordings that are new or could not be
read before, and does not change earlier ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.core.atomic_files import sync
from data_pipeline.core.integrity import with_check
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ABSENT, ConfigError, diff, flatten
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.recordings import FileRow, Recordings, file_of, name_hash
from data_pipeline.corpora.records import RecordingId, Reject, recording_id
from data_pipeline.preprocess.config import PreprocessConfig, content_settings
from data_pipeline.preprocess.new_recordings import compare_with_plan
from data_pipeline.preprocess.plan_file import (
    SPLITS,
    Dropped,
    PlannedUnit,
    PlanTable,
    TableWriter,
    WorkUnit,
    expected_seconds,
)

WRITER_VERSION: Final = 1
"""Part of every unit's name; increase it when the bytes for the same input change."""
BYTES_PER_SECOND: Final = {"flac": 18_000, "wav": 32_000, "opus": 4_000}
"""Bytes per second in a shard, for planning; FLAC as measured on read speech."""
T = TypeVar("T")
CHUNK: Final = 200_000
"""Recordings that are looked up at a time in the whole plan."""


Entry = tuple[int, str]
"""(number of the generation, unit) of a recording in a plan; the unit of a duplicate is ""."""


@dataclass
class WorkPlan:
    """All units of a data set, and the results of planning. Recordings stay on disk."""

    tables: list[PlanTable] = field(default_factory=list)
    """One per generation. A recording in several was retried, and the last one counts."""
    units: list[PlannedUnit] = field(default_factory=list)
    """Sorted by name."""
    changed_files: int = 0
    """Recordings that have changed on disk since they were written to a shard, which is kept."""
    relabelled: int = 0
    """Recordings whose speaker, language or text in the corpus differs from what was written to a shard."""
    again: set[str] = field(default_factory=set)
    """Units without a readable recording; this job processes them again."""

    def work_units(self) -> Iterator[WorkUnit]:
        """Yields all units with their recordings."""
        tables = {table.name: table for table in self.tables}
        return (tables[unit.table].unit(unit) for unit in self.units)

    def newest(self, ids: Collection[RecordingId]) -> dict[RecordingId, str]:
        """Returns the unit of the last generation with each of these recordings, "" for a duplicate."""
        return {key: found[-1][1] for key, found in self._entries(ids, self.tables).items()}

    @functools.cached_property
    def retried(self) -> dict[RecordingId, list[Entry]]:
        """The entries of each recording in several generations, the first one first."""
        found = set[RecordingId]()
        for number, table in enumerate(self.tables[1:], start=1):
            for ids in _chunks(_ids(table)):
                found |= self._entries(ids, self.tables[:number]).keys()
        return self._entries(found, self.tables)

    def dropped(self) -> Iterator[Dropped]:
        """Yields the duplicates that no later generation retries."""
        for number, table in enumerate(self.tables):
            for drop in table.dropped():
                entries = self.retried.get(recording_id(drop.file))
                if entries is None or entries[-1][0] == number:
                    yield drop

    def planned(self, units: Collection[str]) -> Counter[str]:
        """Returns the number of recordings by corpus whose last entry is a duplicate or in one of these units."""
        known = {*units, ""}
        found, wanted = Counter[str](), pa.array(sorted(known), pa.string())
        for table in self.tables:
            for batch in table.batches(["corpus", "unit"]):
                inside = batch["corpus"].filter(pc.is_in(batch["unit"], wanted))
                found.update({one["values"].as_py(): one["counts"].as_py() for one in inside.value_counts()})
        for (corpus, _), entries in self.retried.items():
            found[corpus] += (entries[-1][1] in known) - sum(unit in known for _, unit in entries)
        return found

    def _entries(self, ids: Collection[RecordingId], tables: Sequence[PlanTable]) -> dict[RecordingId, list[Entry]]:
        """Returns the entries of recordings in the order of these tables."""
        found: dict[RecordingId, list[Entry]] = {}
        wanted, names = set(ids), pa.array(sorted({file_id for _, file_id in ids}), pa.string())
        for number, table in enumerate(tables if wanted else ()):
            for batch in table.batches(["corpus", "file_id", "unit"]):
                kept = batch.filter(pc.is_in(batch["file_id"], names))
                for corpus, file_id, unit in zip(*(column.to_pylist() for column in kept.columns), strict=True):
                    if (corpus, file_id) in wanted:
                        found.setdefault((corpus, file_id), []).append((number, unit))
        return found


FindDuplicates = Callable[[Recordings, WorkPlan], Sequence[Dropped]]
"""Returns the duplicates among new recordings, given these and the plan so far."""


def freeze_plan(
    store: FileStore,
    recordings: Recordings,
    config: PreprocessConfig,
    *,
    failures: Mapping[RecordingId, Reject] | None = None,
    dry: bool = False,
    find_duplicates: FindDuplicates | None = None,
) -> WorkPlan:
    """Adds recordings to the plan that are new, or failed before and may be readable now.

    Args:
        store: the data set.
        recordings: the discovered recordings.
        config: the job.
        failures: rejects of recordings that earlier jobs could not read; see `new_recordings`.
        dry: write nothing.
        find_duplicates: finds duplicates among the new recordings.

    Returns:
        The whole plan, including that of earlier jobs; that of a dry run has no table of its new units.

    Raises:
        ConfigError: the folder has shards of other settings.
        ValueError: a plan in the folder is damaged.
    """
    _check_settings(store, config, dry)
    while True:
        plan = read_plan(store)
        compared = compare_with_plan(plan.tables, recordings, failures or {})
        fresh, plan.changed_files, plan.relabelled = compared.fresh, compared.changed, compared.relabelled
        if not fresh:
            return plan
        if dry:
            made = _units(plan, group(fresh, config))
        else:
            dropped = find_duplicates(fresh, plan) if find_duplicates else ()
            with store.scratch() as folder:
                table, made = _write(folder / "plan", plan, _without(fresh, dropped), dropped, config)
                if made or dropped:
                    if not _claim(store, len(plan.tables), folder / "plan", table):
                        continue  # another job was faster
                    plan.tables.append(PlanTable(store, table[:16]))
        plan.units = sorted([*plan.units, *made], key=lambda unit: unit.name)
        return plan


def read_plan(store: FileStore) -> WorkPlan:
    """Returns the plan so far. Raises ValueError if a plan is damaged."""
    plan = WorkPlan()
    for name in store.names("_plan", ".sha256"):
        sha256 = store.read(f"_plan/{name}").decode("ascii", "replace").strip()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{store.root}/_plan/{name}: does not hold a sha256; restore it from a copy")
        table = PlanTable(store, sha256[:16])
        if table.sha256() != sha256:
            raise ValueError(f"{table}: checksum mismatch; restore it from a copy")
        plan.tables.append(table)
        plan.units += table.units()
    plan.units.sort(key=lambda unit: unit.name)
    return plan


def set_roots(config: PreprocessConfig) -> list[str]:
    """Returns the data sets that a job writes: `out`, or its folders train, valid and test."""
    return [f"{config.out.rstrip('/')}/{split}" for split in SPLITS] if config.split.enabled else [config.out]


def set_root(config: PreprocessConfig, unit: WorkUnit | PlannedUnit) -> str:
    """Returns the data set that a unit belongs to."""
    return f"{config.out.rstrip('/')}/{unit.split}" if unit.split else config.out


def split_of(file: FileRow, config: PreprocessConfig) -> str:
    """Returns the split of a recording, chosen by its speaker, so that new recordings of a speaker are in the same."""
    if not config.split.enabled:
        return ""
    whole = file_of(file).source_id if file.part else file.file_id
    draw = keyed_seed(config.split.seed, file.corpus, file.speaker or f"file {whole}", "split") / 2**63
    if draw < config.split.valid:
        return "valid"
    return "test" if draw < config.split.valid + config.split.test else "train"


def group(recordings: Recordings, config: PreprocessConfig) -> Iterator[tuple[str, str, list[FileRow]]]:
    """Groups recordings, which are ordered by the hash of their name, into units of about `shard_mb`.

    Yields:
        (split, name of the unit, its recordings).
    """
    bytes_of: dict[str, float] = {}
    sets: dict[str, Recordings] = {}
    for order, row in recordings.ordered():
        split = split_of(row, config)
        bytes_of[split] = bytes_of.get(split, 0.0) + _bytes(row, config)
        if config.split.enabled:
            sets.setdefault(split, Recordings(recordings.folder)).add(row, order=order)
    settings = json.dumps(content_settings(config), sort_keys=True)
    for split in sorted(bytes_of):
        limit = min(config.shard_mb * 1e6, max(bytes_of[split] / config.min_shards, 1e6))
        for rows in _parts(sets.get(split, recordings), limit, config):
            yield split, _unit_name(rows, settings), rows


def _parts(recordings: Recordings, limit: float, config: PreprocessConfig) -> Iterator[list[FileRow]]:
    """Yields consecutive recordings of at most `limit` expected bytes, or a single larger one."""
    rows, held = list[FileRow](), 0.0
    for row in recordings:
        size = _bytes(row, config)
        if rows and held + size > limit:
            yield rows
            rows, held = [], 0.0
        rows.append(row)
        held += size
    yield rows


def _bytes(row: FileRow, config: PreprocessConfig) -> float:
    return expected_seconds(row.path, row.seconds, row.size) * BYTES_PER_SECOND[config.codec]


def _unit_name(rows: Iterable[FileRow], settings: str) -> str:
    sources = [
        f"{row.corpus}\x1f{row.file_id}\x1f{row.size}\x1f{row.mtime}{row.spans}"
        + (f"\x1f{os.fsdecode(row.image)}" if row.image else "")  # names of units without images are older
        for row in rows
    ]
    return name_hash(str(WRITER_VERSION), settings, *sources)


def _units(
    plan: WorkPlan, grouped: Iterable[tuple[str, str, list[FileRow]]], writer: TableWriter | None = None
) -> list[PlannedUnit]:
    """Returns the new units, and adds them to a table.

    A retry of all recordings of a unit has that unit's name: it is processed again, not planned twice.
    """
    known, made, first = {unit.name for unit in plan.units}, list[PlannedUnit](), 0
    for split, name, rows in grouped:
        if name in known:
            plan.again.add(name)
            continue
        seconds = sum(expected_seconds(row.path, row.seconds, row.size) for row in rows)
        made.append(PlannedUnit(name, split, "", first, len(rows), seconds, rows[0].file_id))
        first += len(rows)
        if writer is not None:
            writer.add_unit(name, split, rows)
    return made


def _write(
    path: Path, plan: WorkPlan, recordings: Recordings, dropped: Iterable[Dropped], config: PreprocessConfig
) -> tuple[str, list[PlannedUnit]]:
    """Writes a generation; returns its sha256 and its units."""
    writer = TableWriter(path)
    made = _units(plan, group(recordings, config), writer)
    for drop in dropped:
        writer.add_dropped(drop)
    sha256 = writer.close()
    return sha256, [dataclasses.replace(unit, table=sha256[:16]) for unit in made]


def _claim(store: FileStore, generation: int, table: Path, sha256: str) -> bool:
    sync(table)
    store.put(table, f"_plan/{sha256[:16]}.parquet")
    return store.create(f"_plan/{generation:04d}.sha256", sha256.encode() + b"\n")


def _without(recordings: Recordings, dropped: Iterable[Dropped]) -> Recordings:
    """Returns the recordings that are no duplicates."""
    left_out = {recording_id(drop.file) for drop in dropped}
    if not left_out:
        return recordings
    kept = Recordings(recordings.folder)
    for order, row in recordings.ordered():
        if (row.corpus, row.file_id) not in left_out:
            kept.add(row, order=order)
    return kept


def _ids(table: PlanTable) -> Iterator[RecordingId]:
    for batch in table.batches(["corpus", "file_id"]):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Yields `CHUNK` items at a time."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


def _check_settings(store: FileStore, config: PreprocessConfig, dry: bool) -> None:
    """Raises ConfigError if `dataset.json` has other settings than this job; all shards share them."""
    wanted = json.loads(json.dumps(content_settings(config)))
    text = with_check({"format": WRITER_VERSION, "sample_rate": SAMPLE_RATE, "codec": config.codec, "settings": wanted})
    if not store.exists("dataset.json") and (dry or store.create("dataset.json", text)):
        return
    try:
        found = json.loads(store.read("dataset.json"))
        settings = dict(found.get("settings", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{store.root}/dataset.json: cannot be read ({error}); restore it from a copy") from None
    # a field that did not exist when the data set was written had its default
    before = flatten(_default_settings()) | flatten(settings)
    different = [
        f"{path}={_shown(new)} here, {_shown(old)} there"
        for path, old, new in diff(before, wanted)
        if [old, new] not in ([None, ABSENT], [ABSENT, None])  # a removed field that was not in use
    ]
    if found.get("format") != WRITER_VERSION:
        different.append(f"format {WRITER_VERSION} here, {found.get('format')} there")
    if different:
        raise ConfigError(
            f"out={store.root}: holds shards of other settings ({'; '.join(different)}). All shards of a folder share "
            "them: leave them as they are there, or write this corpus to another out= and read both with "
            "data.shards=[ONE,OTHER]"
        )


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _default_settings() -> Any:
    return json.loads(json.dumps(content_settings(PreprocessConfig(out="-", corpus=PathCorpus(path="-")))))
