"""Reads a whole data set again and says what is not as it was written, down to a single flipped bit."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import soundfile

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.integrity import CHECKSUMS, REPORT, altered_files, is_sealed, with_check
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.preprocess.fingerprints import scan_is_altered
from data_pipeline.preprocess.plan_file import SPLITS
from data_pipeline.preprocess.work_plan import read_plan
from data_pipeline.shards.records import AUDIO_SUFFIXES, DoneRecord, read_index, refuse_code, rejects_name

NO_ROW = dict.fromkeys(("key", "payload_offset", "payload_size", "n_samples"))


def verify(root: str, decode: bool = True) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for everything below `root`; nothing where all is well.

    Compares every hash, and with `decode` reads every sample as another reader would. `root` is a data set, one with
    the folders train, valid and test, or the frame labels of one. Raises ConfigError for a folder that is none of
    these.
    """
    store = FileStore(root)
    if store.exists("labels.json") or store.exists("targets.json"):
        yield from altered_files(store)
        if not store.exists(CHECKSUMS):
            yield CHECKSUMS, "is missing: `auricle targets` has not come to its end"
        return
    sets = [part for part in ("", *SPLITS) if store.names(f"{part}/_done".lstrip("/"), ".json")]
    if not sets:
        raise ConfigError(
            f"{root} holds no finished shards (no _done/*.json); write some with `auricle preprocess out={root}`"
        )
    keys: dict[str, str] = {}
    for part in sets:
        for name, problem in _verify_set(FileStore(f"{store.root}/{part}".rstrip("/")), keys, decode):
            yield f"{part}/{name}".lstrip("/"), problem
    yield from _verify_plan(store, sets)
    yield from altered_files(store)
    if store.exists(REPORT) and not is_sealed(store.read(REPORT)):
        yield REPORT, "is not as it was written"
    for name in store.names("_scan", ".parquet"):
        if scan_is_altered(name, store.read(f"_scan/{name}")):
            yield f"_scan/{name}", "is not as it was written"


def _verify_set(store: FileStore, keys: dict[str, str], decode: bool) -> Iterator[tuple[str, str]]:
    claimed: set[str] = set()
    for name in store.names("_done", ".json"):
        content = store.read(f"_done/{name}")
        try:
            record = DoneRecord.from_json(content, name)
        except ValueError as error:
            yield f"_done/{name}", str(error)
            continue
        # other writers need not add a checksum
        if (b'"check"' in content or store.exists("_plan")) and record.to_json() != content:
            yield f"_done/{name}", "is not as it was written, or another version of auricle wrote it: preprocess again"
        claimed.add(record.shard)
        yield from _verify_unit(store, record, keys, decode)
    for tar in store.names("", ".tar"):
        if tar not in claimed:
            yield tar, "belongs to no finished unit; readers that list the folder would read it"


def _verify_unit(store: FileStore, record: DoneRecord, keys: dict[str, str], decode: bool) -> Iterator[tuple[str, str]]:
    if record.rejects_sha256:
        name = rejects_name(record.unit)
        if not store.exists(name):
            yield name, "is missing"
        elif hashlib.sha256(store.read(name)).hexdigest() != record.rejects_sha256:
            yield name, "its sha256 is not the recorded one"
    if not record.shard:
        return
    try:
        rows = read_index(store.root, record).to_pylist()
    except ValueError as error:
        yield record.shard, str(error)
        return
    if (len(rows), sum(row["n_samples"] for row in rows)) != (record.segments, record.samples):
        yield record.shard, "its index and its record count differently"
    for row in rows:
        if row["key"] in keys:
            yield record.shard, f"the key {row['key']} is in {keys[row['key']]} too"
        keys[row["key"]] = record.shard
    offsets = [row["offset"] for row in rows] + [rows[-1]["offset"] + rows[-1]["size"]]
    name = record.shard + ".idx"
    if not store.exists(name) or store.read(name) != np.array(offsets, "<u8").tobytes():
        yield name, "does not hold the offsets of the samples"
    with store.fs.open(store.path(record.shard), "rb") as file:
        if sha256_of(file) != record.sha256:
            yield record.shard, "its sha256 is not the recorded one"
        elif decode:
            yield from ((record.shard, problem) for problem in _read_samples(file, rows))


def _read_samples(file: IO[bytes], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Reads the tar as any other program would, and holds it against the index."""
    file.seek(0)
    expected = iter(rows)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            refuse_code(info.name, "")
            key, _, suffix = info.name.partition(".")
            content = tar.extractfile(info)
            assert content is not None
            if suffix in AUDIO_SUFFIXES:
                row: dict[str, Any] = next(expected, NO_ROW)
                if (key, info.offset_data, info.size) != (row["key"], row["payload_offset"], row["payload_size"]):
                    yield f"member {info.name} is not what the index says"
                    continue
                frames = len(soundfile.read(io.BytesIO(content.read()), dtype="int16")[0])
                # Opus streams may hold up to one packet more than they were given
                if not 0 <= frames - row["n_samples"] <= (960 if suffix == "opus" else 0):
                    yield f"{info.name} decodes to {frames} samples instead of {row['n_samples']}"
            else:
                json.loads(content.read())
    if next(expected, None) is not None:
        yield "holds fewer samples than its index says"


def _verify_plan(store: FileStore, sets: Sequence[str]) -> Iterator[tuple[str, str]]:
    try:
        if store.exists("dataset.json"):
            content = store.read("dataset.json")
            if with_check(json.loads(content)) != content:
                yield "dataset.json", "is not as it was written"
        planned = {unit.name for unit in read_plan(store)[0].units}
    except (OSError, ValueError) as error:
        yield "_plan", f"cannot be read ({error})"
        return
    for done in (f"{part}/_done".lstrip("/") for part in sets):
        for name in store.names(done, ".json"):
            if planned and name.removesuffix(".json") not in planned:
                yield f"{done}/{name}", "is a unit that no plan holds"
