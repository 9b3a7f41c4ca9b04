"""Plans the work: assigns recordings to shards, once, and stores the assignment on disk.

`_plan/0000.sha256`, `0001.sha256` … in the data set each name a table of recordings by unit. They are created
exclusively, so that concurrent jobs use the same plan. A later job adds one for recordings that are new or could not be
read before, and does not change earlier ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from data_pipeline.core.integrity import with_check
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ABSENT, ConfigError, diff, flatten
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, AudioFile
from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.records import RecordingId, Reject, recording_id
from data_pipeline.preprocess.config import PreprocessConfig, content_settings
from data_pipeline.preprocess.plan_file import SPLITS, Dropped, WorkUnit, read_unit_table, spans_json, write_unit_table

WRITER_VERSION: Final = 1
"""Part of every unit's name; increase it when the bytes for the same input change."""
BYTES_PER_SECOND: Final = {"flac": 18_000, "wav": 32_000, "opus": 4_000}
"""Bytes per second in a shard, for planning; FLAC as measured on read speech."""
SECONDS_PER_BYTE: Final = {
    **dict.fromkeys(("wav", "aif", "aiff", "caf", "au", "sph", "w64", "rf64"), 1 / 32_000),
    "flac": 1 / 18_000,
    **dict.fromkeys(("mp3", "m4a", "aac", "wma"), 1 / 8_000),
    **dict.fromkeys(("opus", "ogg", "webm", "amr"), 1 / 4_000),
}
RETRIED: Final = ("read_error", "vanished", "changed", "needs_media")
"""Reasons of rejects that may be temporary: every later job reads the file again."""


@dataclass
class WorkPlan:
    """All units of a data set, sorted by name, and the results of planning."""

    units: list[WorkUnit] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    changed_files: list[AudioFile] = field(default_factory=list)
    """Recordings that have changed on disk since they were written to a shard, which is kept."""
    relabelled: int = 0
    """Recordings whose speaker, language or text in the corpus differs from what was written to a shard."""
    again: set[str] = field(default_factory=set)
    """Units without a readable recording; this job processes them again."""
    newest: dict[RecordingId, str] = field(default_factory=dict)
    """Unit of the last generation with a recording, "" for a duplicate; a retry is later than the failure."""

    def add(self, units: Iterable[WorkUnit], dropped: Iterable[Dropped]) -> None:
        """Adds a generation, whose entries of recordings replace earlier ones."""
        units, dropped = list(units), list(dropped)
        self.units += units
        self.newest |= {recording_id(file): unit.name for unit in units for file in unit.files}
        self.newest |= {recording_id(drop.file): "" for drop in dropped}
        replaced = {recording_id(file) for unit in units for file in unit.files}
        replaced |= {recording_id(drop.file) for drop in dropped}
        self.dropped = [drop for drop in self.dropped if recording_id(drop.file) not in replaced] + dropped

    def expected_seconds(self) -> float:
        """Returns the approximate seconds of audio, from the corpus or else from file sizes."""
        return sum(expected_seconds(file) for unit in self.units for file in unit.files)


def expected_seconds(file: AudioFile) -> float:
    """Returns the approximate duration of a recording in seconds, without opening the file."""
    return file.seconds or file.size * SECONDS_PER_BYTE.get(file.path.rsplit(".", 1)[-1].lower(), 1 / 16_000)


FindDuplicates = Callable[[Sequence[AudioFile], WorkPlan], Sequence[Dropped]]
"""Returns the duplicates among new recordings, given these and the plan so far."""


def freeze_plan(
    store: FileStore,
    files: Sequence[AudioFile],
    config: PreprocessConfig,
    *,
    failures: Mapping[RecordingId, Reject] | None = None,
    dry: bool = False,
    find_duplicates: FindDuplicates | None = None,
) -> WorkPlan:
    """Adds recordings to the plan that are new, or failed before and may be readable now.

    Args:
        store: the data set.
        files: the discovered recordings.
        config: the job.
        failures: rejects of recordings that earlier jobs could not read; see `RETRIED`.
        dry: write nothing.
        find_duplicates: finds duplicates among the new recordings.

    Returns:
        The whole plan, including that of earlier jobs.

    Raises:
        ConfigError: the folder has shards of other settings.
        ValueError: a plan in the folder is damaged.
    """
    _check_settings(store, config, dry)
    while True:
        plan, generations = read_plan(store)
        fresh = _fresh_files(plan, files, failures or {})
        dropped = list(find_duplicates(fresh, plan)) if fresh and find_duplicates else []
        left_out = {recording_id(drop.file) for drop in dropped}
        units = group([file for file in fresh if recording_id(file) not in left_out], config)
        # a retry of all recordings of a unit has that unit's name: it is processed again, not planned twice
        known = {unit.name for unit in plan.units}
        plan.again = {unit.name for unit in units if unit.name in known}
        units = [unit for unit in units if unit.name not in known]
        if not units and not dropped:
            return plan
        if dry or _claim(store, generations, write_unit_table(units, dropped)):
            plan.add(units, dropped)
            plan.units.sort(key=lambda unit: unit.name)
            return plan


def read_plan(store: FileStore) -> tuple[WorkPlan, int]:
    """Returns the plan so far, and its number of generations. Raises ValueError if a plan is damaged."""
    names, plan = store.names("_plan", ".sha256"), WorkPlan()
    for name in names:
        sha256 = store.read(f"_plan/{name}").decode("ascii", "replace").strip()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{store.root}/_plan/{name}: does not hold a sha256; restore it from a copy")
        content = store.read(f"_plan/{sha256[:16]}.parquet")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{store.root}/_plan/{sha256[:16]}.parquet: checksum mismatch; restore it from a copy")
        try:
            plan.add(*read_unit_table(content))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{store.root}/_plan/{sha256[:16]}.parquet: not a plan ({error!r})") from None
    plan.units.sort(key=lambda unit: unit.name)
    return plan, len(names)


def set_roots(config: PreprocessConfig) -> list[str]:
    """Returns the data sets that a job writes: `out`, or its folders train, valid and test."""
    return [f"{config.out.rstrip('/')}/{split}" for split in SPLITS] if config.split.enabled else [config.out]


def set_root(config: PreprocessConfig, unit: WorkUnit) -> str:
    """Returns the data set that a unit belongs to."""
    return f"{config.out.rstrip('/')}/{unit.split}" if unit.split else config.out


def split_of(file: AudioFile, config: PreprocessConfig) -> str:
    """Returns the split of a recording, chosen by its speaker, so that new recordings of a speaker are in the same."""
    if not config.split.enabled:
        return ""
    draw = keyed_seed(config.split.seed, file.corpus, file.speaker or f"file {file.file_id}", "split") / 2**63
    if draw < config.split.valid:
        return "valid"
    return "test" if draw < config.split.valid + config.split.test else "train"


def group(files: Iterable[AudioFile], config: PreprocessConfig) -> list[WorkUnit]:
    """Groups recordings, ordered by the hash of their name, into units of about `shard_mb`."""
    sets: dict[str, list[AudioFile]] = {}
    for file in sorted(files, key=lambda file: (_hash(file.corpus, file.file_id), file.file_id)):
        sets.setdefault(split_of(file, config), []).append(file)
    return [unit for split in sorted(sets) for unit in _group_set(sets[split], split, config)]


def _group_set(ordered: Sequence[AudioFile], split: str, config: PreprocessConfig) -> list[WorkUnit]:
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


def _unit(files: Sequence[AudioFile], split: str, settings: str) -> WorkUnit:
    sources = [
        f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}{spans_json(file)}"
        + (f"\x1f{file.image}" if file.image else "")  # names of units without images are older
        for file in files
    ]
    return WorkUnit(_hash(str(WRITER_VERSION), settings, *sources), tuple(files), split)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _fresh_files(plan: WorkPlan, files: Iterable[AudioFile], failures: Mapping[RecordingId, Reject]) -> list[AudioFile]:
    """Returns the recordings to process: new ones, and failed ones that changed or whose failure may be temporary."""
    known = {recording_id(file): file for unit in plan.units for file in unit.files}
    duplicates = {recording_id(drop.file): drop.file for drop in plan.dropped}
    # earlier versions used ids as written in manifests: ./a.wav, or an absolute path
    by_path = {(file.corpus, _normal(file.path)): file for file in known.values()}
    fresh = []
    for file in files:
        key = recording_id(file)
        before = known.get(key) or duplicates.get(key) or by_path.get((file.corpus, _normal(file.path)))
        if before is None:
            fresh.append(file)
            continue
        changed = (before.size, before.mtime) != (file.size, file.mtime)
        failure = failures.get(recording_id(before))
        retried = failure is not None and (changed or failure.reason in RETRIED)
        if retried or (changed and key in duplicates and key not in known):
            fresh.append(file)
        elif failure is None:
            if changed:
                plan.changed_files.append(file)
            plan.relabelled += _labels(before) != _labels(file)
    return fresh


def _labels(file: AudioFile) -> tuple[object, ...]:
    return file.speaker, file.language, file.text, dict(file.labels)


def _normal(path: str) -> str:
    return path if "://" in path else posixpath.normpath(os.path.abspath(path))  # noqa: PTH100


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
