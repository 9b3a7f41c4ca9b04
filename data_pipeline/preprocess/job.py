"""Runs preprocessing on Ray: one task per unit, a limited number in flight; tasks exchange paths, never audio."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence

from data_pipeline.audio import vad
from data_pipeline.core import jsonl
from data_pipeline.core.integrity import REPORT, sealed, write_checksums
from data_pipeline.core.packed_files import read_folder, write_pack
from data_pipeline.core.ray_tasks import cluster, run_tasks
from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.discovery import corpus_fingerprint, discover
from data_pipeline.corpora.recordings import Recordings, file_of
from data_pipeline.corpora.records import Discovered, RecordingId, Reject, reject_from_json
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.fingerprints import find_duplicates, scan
from data_pipeline.preprocess.html_report import Page, build_report
from data_pipeline.preprocess.ledger import NOT_LEFT_OUT, Ledger, as_rows, balance
from data_pipeline.preprocess.plan_file import Dropped, PlannedUnit
from data_pipeline.preprocess.progress import live_progress
from data_pipeline.preprocess.summary import JobForecast, Summary
from data_pipeline.preprocess.unit_worker import UnitResult, process_planned, rejects_jsonl
from data_pipeline.preprocess.work_plan import (
    BYTES_PER_SECOND,
    FindDuplicates,
    WorkPlan,
    freeze_plan,
    read_plan,
    set_root,
    set_roots,
)
from data_pipeline.shards.licences import record_licences
from data_pipeline.shards.records import DoneRecord, finished_units, rejects_name
from data_pipeline.shards.statistics import write_columns

SCANNED = 200
"""Number of recordings that one task of the duplicate search reads."""
QUARANTINE = "quarantine.jsonl"
"""File in the data set: recordings without a segment, and rows of tables without a recording, with the reason."""
DUPLICATES = "duplicates.jsonl"
"""File in the data set: each duplicate, the recording that is kept, and their common part."""


def plan_units(config: PreprocessConfig) -> JobForecast:
    """Returns a forecast of `preprocess` without writing anything or starting Ray.

    Raises:
        ConfigError: see `preprocess`.
    """
    store = FileStore(config.out)
    found = discover(config.corpus, store.temporary_place(), in_parts=True)
    records = intact_records(config)
    failures = _failures(config, records)
    plan = freeze_plan(store, found.recordings, config, failures=failures, dry=True)
    done = {record.unit for record in records} - plan.again
    todo = [unit for unit in plan.units if unit.name not in done]
    seconds = sum(unit.seconds for unit in todo)
    return JobForecast(
        units=len(plan.units),
        units_done=len(plan.units) - len(todo),
        files=sum(unit.files for unit in todo),
        hours=seconds / 3600,
        megabytes=seconds * BYTES_PER_SECOND[config.codec] / 1e6,
        free_megabytes=store.free_bytes() / 1e6 if store.local else None,
        unusable=len(found.rejects),
        skipped=dict(found.skipped),
        warnings=tuple(found.warnings),
    )


def preprocess(config: PreprocessConfig, progress: bool = True) -> Summary:
    """Writes the part of the corpus that is not yet in `config.out`; calling it again continues an interrupted job.

    Unreadable recordings are listed, not raised; the next job retries those that may become readable. Work units whose
    workers die repeatedly are listed in the summary.

    Args:
        config: corpus, stages and output.
        progress: whether to show a progress bar on stderr.

    Returns:
        The content of the data set, rejects by reason, and the work of this job.

    Raises:
        ConfigError: the corpus is missing or empty, or the folder has shards of other settings.
        StorageReadError: the corpus cannot be listed now, or the data set cannot be read.
        OSError: the output cannot be written.
        ValueError: a file of the data set is damaged.
    """
    began = time.monotonic()
    if config.vad.enabled:
        vad.require()
    store = FileStore(config.out)
    for root in {config.out, *set_roots(config)}:
        FileStore(root).sweep()
    found = discover(config.corpus, store.temporary_place(), in_parts=True)
    work = _Work()
    records = intact_records(config, repair=True)
    failures = _failures(config, records)
    with contextlib.ExitStack() as stack:
        wanted = config.dedup.exact or config.dedup.near
        finder = _duplicates_finder(config, stack, progress, set(failures)) if wanted else None
        plan = freeze_plan(store, found.recordings, config, failures=failures, find_duplicates=finder)
        _store_rejects(store, config, found)
        for unit in (unit for unit in plan.units if unit.name in plan.again):
            FileStore(set_root(config, unit)).remove(f"_done/{unit.name}.json")
        before = {record.unit for record in records} - plan.again
        # the longest first, so that no unit of a day-long recording is left over at the end
        todo = sorted((unit for unit in plan.units if unit.name not in before), key=lambda unit: -unit.seconds)
        if todo:
            stack.enter_context(cluster(config.ray, show=progress))
            advance = stack.enter_context(live_progress(todo, progress))
            work = _run_units(todo, config, advance)
    for root in {config.out, *set_roots(config)}:
        FileStore(root).sweep()
    return _finish(config, plan, found, before=before, work=work, seconds=time.monotonic() - began)


@dataclasses.dataclass
class _Work:
    """What the workers of a job did."""

    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Reasons by unit that could not be finished."""
    workers: int = 0
    busy: float = 0.0
    """Share of their time in which they processed units."""


def intact_records(config: PreprocessConfig, repair: bool = False) -> list[DoneRecord]:
    """Returns the finished units with a complete shard; with `repair`, the records of other units are removed.

    Raises:
        ValueError: a record is damaged, does not match the name of its file, or contains a path.
    """
    good = []
    for store in map(FileStore, set_roots(config)):
        tars = store.stamps("", ".tar")
        for record in finished_units(store.root):
            if not record.shard or tars.get(record.shard, (None, ""))[0] == record.bytes:
                good.append(record)
            elif repair:
                store.remove(f"_done/{record.unit}.json")
    return good


def _failures(config: PreprocessConfig, records: Sequence[DoneRecord]) -> dict[RecordingId, Reject]:
    """Returns the rejects of recordings that the last unit with them could not read."""
    broken = [record for record in records if any(reason.startswith("decode/") for reason in record.rejects)]
    rows = [(unit, reject) for unit, reject in _unit_rejects(config, broken) if reject.stage == "decode"]
    if not rows:
        return {}
    newest = read_plan(FileStore(config.out)).newest({reject.recording_id for _, reject in rows})
    return {reject.recording_id: reject for unit, reject in rows if newest.get(reject.recording_id, unit) == unit}


def _unit_rejects(config: PreprocessConfig, records: Sequence[DoneRecord]) -> Iterator[tuple[str, Reject]]:
    """Yields (unit, reject) of finished units."""
    finished = {record.unit for record in records if record.rejects_sha256}
    for store in map(FileStore, set_roots(config)):
        for name, content in read_folder(store, "_rejects", ".jsonl") if finished else ():
            unit = name.removesuffix(".jsonl")
            if unit in finished:
                yield from ((unit, reject) for reject in _parsed_rejects(store, name, content))


def _parsed_rejects(store: FileStore, name: str, content: bytes) -> list[Reject]:
    """Parses a rejects file. Raises ValueError if a line is damaged."""
    found = jsonl.parse(content)
    try:
        if found.bad_lines:
            raise ValueError(f"line {found.bad_lines[0]} is not JSON")
        return [reject_from_json(row) for row in found.rows]
    except ValueError as error:
        raise ValueError(
            f"{store.root}/_rejects/{name}: damaged ({error}); delete it and _done/{name.removesuffix('l')}, and run "
            "the same command again"
        ) from None


def _duplicates_finder(
    config: PreprocessConfig, stack: contextlib.ExitStack, show: bool, retried: set[RecordingId]
) -> FindDuplicates:
    """Returns the function that finds duplicates among new recordings, which it reads on Ray."""

    def find(fresh: Recordings, plan: WorkPlan) -> Sequence[Dropped]:
        stack.enter_context(cluster(config.ray, show))
        rows = iter(fresh)
        parts = iter(lambda: [file_of(row) for row in itertools.islice(rows, SCANNED)], [])
        arguments = ((f"{part[0].file_id} …", (part, config.dedup.near, config.out)) for part in parts)
        failed = run_tasks(scan, arguments, config.ray, lambda _: None)
        if failed:
            raise OSError(f"the search for duplicates did not finish: {next(iter(failed.values()))}")
        return find_duplicates(config.out, config.dedup, fresh, _older(plan, retried))

    return find


def _older(plan: WorkPlan, retried: set[RecordingId]) -> Iterator[RecordingId]:
    """Yields the recordings in units of a plan, except those that are retried; those of several units repeatedly."""
    for table in plan.tables:
        for batch in table.batches(["corpus", "file_id", "unit"]):
            for corpus, file_id, unit in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if unit and (corpus, file_id) not in retried:
                    yield corpus, file_id


def _run_units(todo: Sequence[PlannedUnit], config: PreprocessConfig, advance: Callable[[UnitResult], None]) -> _Work:
    """Processes units. Raises OSError if a worker cannot write."""
    import ray

    shared, began, worked = ray.put(config), time.monotonic(), list[float]()

    def count(result: UnitResult) -> None:
        worked.append(result.seconds)
        advance(result)

    try:
        failed = run_tasks(process_planned, ((unit.name, (unit, shared)) for unit in todo), config.ray, count)
    except StorageReadError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "once there is room" if full else "once it can be written"
        raise OSError(
            error.errno,
            f"out={config.out}: cannot be written ({error}); finished shards are kept, and the same command "
            f"continues {remedy}",
        ) from None
    first_files = {unit.name: unit.first_id for unit in todo}
    reasons = {name: f"{why}; its files begin with {first_files[name]}" for name, why in failed.items()}
    workers = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    return _Work(reasons, workers, min(sum(worked) / (workers * (time.monotonic() - began)), 1.0))


def _store_rejects(store: FileStore, config: PreprocessConfig, found: Discovered) -> None:
    """Writes the rejects of discovery, one file for each corpus of the data set."""
    corpus = f"{config.corpus.name}-{corpus_fingerprint(config.corpus)}"
    if found.rejects:
        store.replace(rejects_name(f"discover-{corpus}"), rejects_jsonl(found.rejects))
    else:
        store.remove(rejects_name(f"discover-{corpus}"))


def _finish(
    config: PreprocessConfig,
    plan: WorkPlan,
    found: Discovered,
    *,
    before: set[str],
    work: _Work,
    seconds: float,
) -> Summary:
    """Summarises the data set, and writes its lists and report."""
    store = FileStore(config.out)
    for part in map(FileStore, set_roots(config)):
        write_pack(part, "_done", ".json")
        write_pack(part, "_rejects", ".jsonl")
    sets = [(root, finished_units(root)) for root in set_roots(config)]
    for place, finished in sets:
        write_columns(place, finished)
    records = [record for _, found_there in sets for record in found_there]
    listed = [name for name in store.names("_rejects", ".jsonl") if name.startswith("discover-")]
    contents = [(name, store.read(f"_rejects/{name}")) for name in listed]
    discovered = [reject for name, content in contents for reject in _parsed_rejects(store, name, content)]
    ledger = balance(plan, records, _unit_rejects(config, records), discovered)
    quarantine = ledger.quarantine
    quarantine += [
        Reject(path="", file_id=unit, corpus="", language="", stage="unit", reason="worker_died", error=why)
        for unit, why in sorted(work.failed.items())
    ]
    store.replace(QUARANTINE, rejects_jsonl(quarantine))
    sums = [QUARANTINE, *(f"_rejects/{name}" for name in listed)]
    duplicates = as_rows(plan.dropped())
    if duplicates:
        store.replace(DUPLICATES, b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in duplicates))
        sums.append(DUPLICATES)
    write_checksums(store, sums)
    if licences := {corpus: ", ".join(sorted(names)) for corpus, names in found.licences.items()}:
        for root in {record.root for record in records}:
            record_licences(root, licences)
    new = [record for record in records if record.unit not in before]
    summary = dataclasses.replace(
        _summary(config, ledger, records, new),
        failed_units=work.failed,
        workers=work.workers,
        busy=work.busy,
        units_done=len(new),
        units_before=len(before),
        changed_files=plan.changed_files,
        relabelled=plan.relabelled,
        seconds=seconds,
        skipped=dict(found.skipped),
        warnings=tuple(found.warnings),
    )
    if config.report:
        page = Page(
            title=config.out,
            sets=sets,
            ledger=ledger,
            duplicates=duplicates,
            facts=summary.rows(),
        )
        store.replace(REPORT, sealed(build_report(page)))
    return summary


def _summary(
    config: PreprocessConfig,
    ledger: Ledger,
    records: Sequence[DoneRecord],
    new: Sequence[DoneRecord],
) -> Summary:
    left_out: dict[str, tuple[int, float]] = {}
    for stage, reason in sorted({key[2:] for key in ledger.counts if key[2] not in NOT_LEFT_OUT}):
        count, samples = ledger.total(stage, reason)
        left_out[f"{stage}/{reason}"] = (count, samples / SAMPLE_RATE / 3600)
    files, came = ledger.total("in")
    segments, went = ledger.total("out")
    folder = config.out.rstrip("/")
    return Summary(
        out=config.out,
        files=files,
        files_used=ledger.total("recording", "used")[0],
        hours_in=came / SAMPLE_RATE / 3600,
        hours_out=went / SAMPLE_RATE / 3600,
        hours_overlapping=ledger.total("in", "overlap")[1] / SAMPLE_RATE / 3600,
        segments=segments,
        shards=sum(1 for record in records if record.shard),
        megabytes=sum(record.bytes for record in records) / 1e6,
        rejects=left_out,
        quarantined=sum(1 for reject in ledger.quarantine if reject.stage != "unit"),
        quarantine=f"{folder}/{QUARANTINE}",
        report=f"{folder}/{REPORT}" if config.report else "",
        imbalances=tuple(ledger.imbalances),
        new_files=sum(record.files for record in new),
        new_segments=sum(record.segments for record in new),
        new_hours=sum(row[5] for record in new for row in record.flow if row[2:4] == ("in", "")) / SAMPLE_RATE / 3600,
    )
