"""Verifies a whole data set: checksum and structure of every file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import operator
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

import numpy as np

from data_pipeline.audio.samples import open_sample
from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.integrity import CHECKSUMS, REPORT, altered_files, is_sealed, with_check
from data_pipeline.core.packed_files import pack_name, read_files, read_folder
from data_pipeline.core.progress import Begin, silent
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.images import decoding
from data_pipeline.preprocess.plan_file import SPLITS
from data_pipeline.preprocess.scans import scan_is_altered
from data_pipeline.preprocess.work_plan import read_plan
from data_pipeline.shards.local import LABELS_IN_COLUMNS
from data_pipeline.shards.records import AUDIO_SUFFIXES, DoneRecord, placed, read_index, refuse_code, rejects_name

NO_ROW: Final = dict.fromkeys(("key", "payload_offset", "payload_size", "n_samples"))
OPUS_PACKET: Final = 960
"""Opus streams may decode to up to one packet of samples more than were encoded."""
Fault = tuple[str, str]
"""(file below the folder, fault)."""


def verify(root: str, decode: bool = True, begin: Begin = silent) -> Iterator[Fault]:
    """Verifies every file of a data set against its checksums and records.

    Memory is bounded regardless of the files' content, and verification continues after a fault.

    Args:
        root: a data set, one with the folders train, valid and test, or a folder of frame labels.
        decode: also decode every sample, as another reader would; otherwise only checksums are compared.
        begin: shows stages of the work.

    Yields:
        (file below `root`, fault); nothing without faults.

    Raises:
        ConfigError: the folder has neither shards nor labels.
    """
    store = FileStore(root)
    if store.exists("labels.json") or store.exists("targets.json"):
        yield from _guarded(CHECKSUMS, altered_files(store))
        if not store.exists(CHECKSUMS):
            yield CHECKSUMS, "is missing: `auricle targets` did not finish"
        return
    sets = [part for part in ("", *SPLITS) if store.names(f"{part}/_done".lstrip("/"), ".json")]
    if not sets:
        raise ConfigError(
            f"{root} holds no finished shards (no _done/*.json); write some with `auricle preprocess out={root}`"
        )
    keys = ExternalSort()
    for part in sets:
        for name, problem in _verify_set(FileStore(f"{store.root}/{part}".rstrip("/")), keys, decode, begin):
            yield f"{part}/{name}".lstrip("/"), problem
    for key, rows in itertools.groupby(keys, key=operator.itemgetter(0)):
        first, *others = (shard for _, shard in rows)
        yield from ((shard, f"the key {key} is in {first} too") for shard in others)
    begin("comparing plan and checksums", 1)
    yield from _guarded("_plan", _verify_plan(store, sets))
    yield from _guarded(CHECKSUMS, altered_files(store))
    if store.exists(REPORT):
        yield from _guarded(REPORT, _verify_report(store))
    for name in store.names("_scan", ".parquet"):
        yield from _guarded(f"_scan/{name}", _verify_scan(store, name))


def _guarded(name: str, faults: Iterator[Fault]) -> Iterator[Fault]:
    """Passes faults on; an error that ends the iteration becomes a fault of the file `name`."""
    try:
        yield from faults
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        yield name, f"cannot be read ({type(error).__name__}: {error})"


def _verify_report(store: FileStore) -> Iterator[Fault]:
    if not is_sealed(store.read(REPORT)):
        yield REPORT, "checksum mismatch"


def _verify_scan(store: FileStore, name: str) -> Iterator[Fault]:
    if scan_is_altered(name, store.read(f"_scan/{name}")):
        yield f"_scan/{name}", "checksum mismatch"


def _verify_set(store: FileStore, keys: ExternalSort, decode: bool, begin: Begin) -> Iterator[Fault]:
    claimed: set[str] = set()
    names = store.names("_done", ".json")
    advance = begin(f"{'reading and decoding' if decode else 'reading'} shards", len(names))
    planned = store.exists("_plan")
    for name in names:
        found = _verify_record(store, name, keys, claimed, decode=decode, planned=planned)
        yield from _guarded(f"_done/{name}", found)
        advance(name)
    for folder, suffix in (("_done", ".json"), ("_rejects", ".jsonl")):
        yield from _guarded(pack_name(folder), _verify_pack(store, folder, suffix))
    for tar in store.names("", ".tar"):
        if tar not in claimed:
            yield tar, "belongs to no finished unit, but readers that list the folder would read it"


def _verify_pack(store: FileStore, folder: str, suffix: str) -> Iterator[Fault]:
    """Compares the copies that readers use with their files."""
    if store.exists(pack_name(folder)):
        own = read_files(store, folder, store.names(folder, suffix))
        if any(copy != file for copy, file in zip(read_folder(store, folder, suffix), own, strict=False)):
            yield pack_name(folder), "does not match its files: remove it, and the next job writes it again"


def _verify_record(
    store: FileStore, name: str, keys: ExternalSort, claimed: set[str], *, decode: bool, planned: bool
) -> Iterator[Fault]:
    content = store.read(f"_done/{name}")
    record = placed(DoneRecord.from_json(content, name), store.root)
    # other writers need not add a checksum
    if (b'"check"' in content or planned) and record.to_json() != content:
        yield f"_done/{name}", "checksum mismatch, or another version of auricle wrote it: preprocess again"
    claimed.add(record.shard)
    yield from _guarded(record.shard or f"_done/{name}", _verify_unit(store, record, keys, decode))


def _verify_unit(store: FileStore, record: DoneRecord, keys: ExternalSort, decode: bool) -> Iterator[Fault]:
    if record.rejects_sha256:
        name = rejects_name(record.unit)
        if not store.exists(name):
            yield name, "is missing"
        elif hashlib.sha256(store.read(name)).hexdigest() != record.rejects_sha256:
            yield name, "checksum mismatch: its sha256 is not the recorded one"
    if not record.shard:
        return
    rows: list[dict[str, Any]] | None = None
    foreign = bool(record.location)
    try:
        table = read_index(store.root, record)
        rows, foreign = table.to_pylist(), foreign or LABELS_IN_COLUMNS in (table.schema.metadata or {})
    except (ValueError, OSError) as error:
        yield record.shard, str(error)
    else:
        yield from _verify_index(store, record, rows, keys, foreign=foreign)
    if record.refused:
        return
    tars = FileStore(record.location) if record.location else store
    if rows is not None or tars.exists(record.shard):  # an index is read only where its tar has the right size
        with tars.fs.open(tars.path(record.shard), "rb") as file:
            if sha256_of(file) != record.sha256:
                yield record.shard, "checksum mismatch: its sha256 is not the recorded one"
            if decode:
                read = _read_indexed if foreign else _read_samples
                yield from ((record.shard, problem) for problem in read(file, rows))


def _verify_index(
    store: FileStore, record: DoneRecord, rows: Sequence[Mapping[str, Any]], keys: ExternalSort, *, foreign: bool
) -> Iterator[Fault]:
    """Compares an index with its record; tars of other writers (`foreign`) have no list of offsets."""
    if (len(rows), sum(row["n_samples"] for row in rows)) != (record.segments, record.samples):
        yield record.shard, "its index and its record count differently"
    for row in rows:
        keys.add(row["key"], record.shard)
    offsets = [row["offset"] for row in rows] + [rows[-1]["offset"] + rows[-1]["size"]] * bool(rows)
    if foreign:
        return
    name, listed = record.shard + ".idx", b""
    with contextlib.suppress(FileNotFoundError):
        listed = store.read(name)
    if listed != np.array(offsets, "<u8").tobytes():
        yield name, "does not hold the offsets of the samples"


def _read_samples(file: IO[bytes], rows: Sequence[dict[str, Any]] | None) -> Iterator[str]:
    """Reads the tar sequentially, as any other program would, and compares it with the index, if that is usable."""
    file.seek(0)
    expected = iter(rows or ())
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                row = next(expected, NO_ROW) if info.name.partition(".")[2] in AUDIO_SUFFIXES else None
                try:
                    problem = _problem_of(tar, info, row, indexed=rows is not None)
                except (ValueError, RuntimeError, OSError, RecursionError, MemoryError) as error:
                    problem = f"member {info.name} cannot be read ({error})"
                if problem:
                    yield problem
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        yield f"cannot be read on as a tar ({error})"
        return
    if next(expected, None) is not None:
        yield "holds fewer samples than its index lists"


def _read_indexed(file: IO[bytes], rows: Sequence[dict[str, Any]] | None) -> Iterator[str]:
    """Decodes the indexed samples of a tar of another writer; other members are not checked."""
    for row in rows or ():
        file.seek(row["payload_offset"])
        try:
            with open_sample(file.read(row["payload_size"])) as sample:
                frames = sample.count(row["n_samples"])
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            yield f"sample {row['key']} cannot be read ({error})"
            continue
        if frames < row["n_samples"]:
            yield f"sample {row['key']} decodes to {frames} samples; its index lists {row['n_samples']}"


def _problem_of(tar: tarfile.TarFile, info: tarfile.TarInfo, row: Mapping[str, Any] | None, *, indexed: bool) -> str:
    """Returns the fault of a member of a tar, "" without one. row: its row in the index, if the member is audio."""
    refuse_code(info.name, "")
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        return f"member {info.name} is not a regular file"
    key, _, suffix = info.name.partition(".")
    if row is None and suffix == "png":
        decoding.decode(content.read())
        return ""
    if row is None:
        json.loads(content.read())
        return ""
    if indexed and (key, info.offset_data, info.size) != (row["key"], row["payload_offset"], row["payload_size"]):
        return f"member {info.name} is not the one that the index lists"
    spare = OPUS_PACKET if suffix == "opus" else 0
    with open_sample(content) as sample:
        frames = sample.count(row["n_samples"] + spare if indexed else None)
    wanted = row["n_samples"]
    if indexed and not 0 <= frames - wanted <= spare:
        found = f"more than {wanted + spare}" if frames > wanted + spare else str(frames)
        return f"{info.name} decodes to {found} samples instead of {wanted}"
    return ""


def _verify_settings(store: FileStore) -> Iterator[Fault]:
    content = store.read("dataset.json")
    if with_check(json.loads(content)) != content:
        yield "dataset.json", "checksum mismatch"


def _verify_plan(store: FileStore, sets: Sequence[str]) -> Iterator[tuple[str, str]]:
    if store.exists("dataset.json"):
        yield from _guarded("dataset.json", _verify_settings(store))
    planned = {unit.name for unit in read_plan(store).units}
    for done in (f"{part}/_done".lstrip("/") for part in sets):
        for name in store.names(done, ".json"):
            if planned and name.removesuffix(".json") not in planned:
                yield f"{done}/{name}", "is a unit that is in no plan"
