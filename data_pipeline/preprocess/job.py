"""Runs preprocessing on Ray: one task per unit, a bounded number in flight; only paths travel, never audio."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

from data_pipeline.audio import vad
from data_pipeline.core.integrity import REPORT, sealed, write_checksums
from data_pipeline.core.jsonl import parse
from data_pipeline.core.ray_tasks import cluster, run_tasks
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, AudioFile
from data_pipeline.corpora.discovery import discover, fingerprint
from data_pipeline.corpora.records import Discovered, Reject
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.fingerprints import find_doubles, scan
from data_pipeline.preprocess.html_report import build_report
from data_pipeline.preprocess.progress import live_progress
from data_pipeline.preprocess.summary import Forecast, Summary
from data_pipeline.preprocess.unit_worker import UnitResult, process_unit, rejects_jsonl
from data_pipeline.preprocess.work_plan import (
    BYTES_PER_SECOND,
    Dropped,
    FindDoubles,
    Plan,
    Unit,
    freeze_plan,
    set_roots,
)
from data_pipeline.shards.records import DoneRecord, finished_units, rejects_name

SCANNED = 200
"""Recordings that one task looks through for doubles."""


QUARANTINE = "quarantine.jsonl"
"""In the data set: every file that gave nothing, with stage, reason and error."""


def plan_units(config: PreprocessConfig) -> Forecast:
    """What `preprocess` would do; writes nothing and starts no Ray. Raises ConfigError like it."""
    store = FileStore(config.out)
    found = discover(config.corpus)
    plan = freeze_plan(store, found.files, config, dry=True)
    done = {record.unit for record in _standing(config)}
    todo = Plan([unit for unit in plan.units if unit.name not in done])
    seconds = todo.expected_seconds()
    return Forecast(
        units=len(plan.units),
        units_done=len(plan.units) - len(todo.units),
        files=sum(len(unit.files) for unit in todo.units),
        hours=seconds / 3600,
        megabytes=seconds * BYTES_PER_SECOND[config.codec] / 1e6,
        free_megabytes=store.free_bytes() / 1e6 if store.local else None,
        unusable=len(found.rejects),
    )


def preprocess(config: PreprocessConfig, progress: bool = True) -> Summary:
    """Writes what of the corpus is not yet in `config.out`; the same call again continues, or finds nothing to do.

    Raises ConfigError for a corpus that is missing or empty or a folder of other settings, and OSError when the output
    cannot be written. Bad files are quarantined, units whose workers die again and again are listed in the summary.
    """
    began = time.monotonic()
    if config.vad.enabled:
        vad.require()
    store = FileStore(config.out)
    for root in {config.out, *set_roots(config)}:
        FileStore(root).sweep()
    found = discover(config.corpus)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        doubles = _doubles_finder(config, stack, progress) if config.dedup.exact or config.dedup.near else None
        plan = freeze_plan(store, found.files, config, find_doubles=doubles)
        _note_rejects(store, config, found)
        before = {record.unit for record in _standing(config, repair=True)}
        todo = [unit for unit in plan.units if unit.name not in before]
        if todo:
            stack.enter_context(cluster(config.ray, show=progress))
            advance = stack.enter_context(live_progress(todo, progress))
            failed = _run_units(todo, config, advance)
    for root in {config.out, *set_roots(config)}:
        FileStore(root).sweep()
    return _summary(store, config, plan, before, failed, time.monotonic() - began)


def _doubles_finder(config: PreprocessConfig, stack: contextlib.ExitStack, show: bool) -> FindDoubles:
    """Reads the new recordings on Ray, to find those that are there twice."""

    def find(fresh: Sequence[AudioFile], plan: Plan) -> Sequence[Dropped]:
        older = {(file.corpus, file.file_id) for unit in plan.units for file in unit.files}
        parts = {str(start): fresh[start : start + SCANNED] for start in range(0, len(fresh), SCANNED)}
        stack.enter_context(cluster(config.ray, show))
        arguments = {name: (part, config.dedup.near, config.out) for name, part in parts.items()}
        failed = run_tasks(scan, arguments, config.ray, lambda _: None)
        if failed:
            raise OSError(f"the search for doubles did not finish: {next(iter(failed.values()))}")
        return find_doubles(config.out, config.dedup, fresh, older)

    return find


def _run_units(todo: Sequence[Unit], config: PreprocessConfig, advance: Callable[[UnitResult], None]) -> dict[str, str]:
    """Units that failed, and why. Raises OSError when a worker cannot write."""
    import ray

    shared = ray.put(config)
    try:
        failed = run_tasks(process_unit, {unit.name: (unit, shared) for unit in todo}, config.ray, advance)
    except OSError as error:
        raise OSError(
            f"out={config.out}: cannot be written ({error}); what is finished stays, and the same command "
            "continues once there is room"
        ) from None
    first_files = {unit.name: unit.files[0].file_id for unit in todo}
    return {name: f"{why}; its files begin with {first_files[name]}" for name, why in failed.items()}


def _standing(config: PreprocessConfig, repair: bool = False) -> list[DoneRecord]:
    """Finished units whose shard is there in full; with `repair`, the records of others are removed."""
    good = []
    for store in map(FileStore, set_roots(config)):
        for record in finished_units(store.root):
            try:
                whole = not record.shard or store.size(record.shard) == record.bytes
            except FileNotFoundError:
                whole = False
            if whole:
                good.append(record)
            elif repair:
                store.remove(f"_done/{record.unit}.json")
    return good


def _note_rejects(store: FileStore, config: PreprocessConfig, found: Discovered) -> None:
    """Keeps what discovery could not use, one file for each corpus that ever went into the data set."""
    corpus = f"{config.corpus.name}-{fingerprint(config.corpus)}"
    if found.rejects:
        store.replace(rejects_name(f"discover-{corpus}"), rejects_jsonl(found.rejects))
    else:
        store.remove(rejects_name(f"discover-{corpus}"))


def _collect_quarantine(config: PreprocessConfig, units: Sequence[DoneRecord]) -> list[Reject]:
    """Files that gave nothing, over the whole data set."""
    finished = {f"{record.unit}.jsonl" for record in units if record.rejects_sha256}
    rejects = []
    for store in map(FileStore, sorted({config.out, *set_roots(config)})):
        names = [name for name in store.names("_rejects", ".jsonl") if name in finished or name.startswith("discover-")]
        rows = [row for name in names for row in parse(store.read(f"_rejects/{name}")).rows]
        rejects += [Reject(**row) for row in rows]
    return [reject for reject in rejects if reject.stage in ("discover", "decode")]


def _summary(
    store: FileStore, config: PreprocessConfig, plan: Plan, before: set[str], failed: dict[str, str], seconds: float
) -> Summary:
    records = [record for root in set_roots(config) for record in finished_units(root)]
    quarantine = _collect_quarantine(config, records)
    quarantine += [Reject("", unit, "", "", "unit", "worker_died", why) for unit, why in sorted(failed.items())]
    store.replace(QUARANTINE, rejects_jsonl(quarantine))
    found = [f"_rejects/{name}" for name in store.names("_rejects", ".jsonl") if name.startswith("discover-")]
    write_checksums(store, [QUARANTINE, *found])
    counts: Counter[str] = Counter(f"discover/{reject.reason}" for reject in quarantine if reject.stage == "discover")
    counts.update(f"dedup/{drop.reason}" for drop in plan.dropped)
    samples: Counter[str] = Counter()
    for record in records:
        for _, _, stage, reason, count, length in record.flow:
            counts[f"{stage}/{reason}"] += count
            samples[f"{stage}/{reason}"] += length
    new = [record for record in records if record.unit not in before]
    hours = {key: value / SAMPLE_RATE / 3600 for key, value in samples.items()}
    new_hours = sum(row[5] for record in new for row in record.flow if row[2] == "in") / SAMPLE_RATE / 3600
    summary = Summary(
        out=config.out,
        files=counts["in/"],
        hours_in=hours.get("in/", 0.0),
        hours_out=hours.get("out/", 0.0),
        segments=counts["out/"],
        shards=sum(1 for record in records if record.shard),
        megabytes=sum(record.bytes for record in records) / 1e6,
        rejects={key: (counts[key], hours.get(key, 0.0)) for key in sorted(counts) if key not in ("in/", "out/")},
        quarantined=sum(1 for reject in quarantine if reject.stage != "unit"),
        quarantine=f"{config.out.rstrip('/')}/{QUARANTINE}",
        report=f"{config.out.rstrip('/')}/{REPORT}" if config.report else "",
        units_done=len(new),
        units_before=len(before),
        failed_units=failed,
        changed_files=len(plan.changed_files),
        seconds=seconds,
        hours_per_second=new_hours / seconds,
    )
    if config.report:
        sets = [(root, finished_units(root)) for root in set_roots(config)]
        page = build_report(config.out, sets, summary.rows(), quarantine)
        store.replace(REPORT, sealed(page))
    return summary
