"""auricle shards: reports content and integrity of a shard folder, and indexes existing WebDataset tars."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_pipeline.core.progress import stages
from data_pipeline.core.schema import document, load
from data_pipeline.core.storage import FileStore
from data_pipeline.core.text import visible
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.preprocess.plan_file import SPLITS
from data_pipeline.preprocess.verify import verify
from data_pipeline.shards.indexing import IndexConfig, index_tars
from data_pipeline.shards.records import DoneRecord, done_records, finished_units, read_index
from data_pipeline.shards.statistics import SegmentAmount, statistics_of
from launch.cli.command_table import SUBCOMMANDS
from launch.cli.parser import Parser
from launch.cli.tables import cell, console, show, show_rows, table
from launch.exit_codes import ExitCode

QUANTILES = {0: "shortest", 5: "5 % below", 50: "median", 95: "95 % below", 100: "longest"}
WIDE = 140
"""Columns of a terminal in which a sample has space on one line."""


def run(arguments: list[str]) -> int:
    """Runs a subcommand; returns 0, or 1 if `verify` finds a fault."""
    parser = Parser("auricle shards", description="content and integrity of a shard folder")
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(SUBCOMMANDS["shards"]))
    for name, text in SUBCOMMANDS["shards"].items():
        subcommand = subcommands.add_parser(name, help=text)
        if name == "index":
            subcommand.add_argument("folder", help="folder or fsspec URL of the tars")
            subcommand.add_argument("settings", nargs="*", help="FIELD=VALUE of: " + ", ".join(_index_fields()))
            continue
        subcommand.add_argument("folder", help="shard folder or fsspec URL")
        if name == "inspect":
            subcommand.add_argument("--key", default="", help="only keys that contain this")
            subcommand.add_argument("-n", type=int, default=20, help="samples to show (default: 20)")
    given = parser.parse_args(arguments)
    if given.subcommand == "index":
        return _index(given.folder, given.settings)
    if given.subcommand == "verify":
        return _verify(given.folder)
    records = done_records(given.folder)
    if given.subcommand == "stats":
        return _stats(given.folder, records)
    return _inspect(given.folder, records, given.key, given.n)


def _index_fields() -> list[str]:
    return [f"{row.path} ({row.description})" for row in document(IndexConfig) if row.path != "tars"]


def _index(tars: str, settings: list[str]) -> int:
    values = {name: _value(value) for name, _, value in (setting.partition("=") for setting in settings)}
    config = load(IndexConfig, {**values, "tars": tars})
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("indexing", total=len(FileStore(tars).names("", ".tar")))
        summary = index_tars(config, lambda: bar.advance(task))
    hours = summary.samples / SAMPLE_RATE / 3600
    print(f"{summary.tars} tars ({summary.already} indexed before), {summary.segments:,} segments, {hours:.2f} hours")
    if summary.rejects:
        print("rejected " + ", ".join(f"{reason}: {count:,}" for reason, count in summary.rejects.most_common()))
    print(f"read them with data.shards={config.index_out or tars}")
    return ExitCode.DONE


def _value(text: str) -> Any:
    """Parses a number, true, false or another JSON value; other text is returned unchanged."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _stats(root: str, records: list[DoneRecord]) -> int:
    found = statistics_of([(root, records)])
    speakers = found.named("corpus", "language")

    def row(group: tuple[str, str], named: int, amount: SegmentAmount) -> tuple[str, ...]:
        hours = amount.samples / SAMPLE_RATE / 3600
        return group[0], group[1], f"{named:,}", f"{amount.segments:,}", f"{hours:.2f}"

    groups = sorted(found.total("corpus", "language").items())
    rows = [row((key[0], key[1] or "–"), speakers[key], amount) for key, amount in groups]
    rows.append(row(("all", ""), found.named()[()], found.total()[()]))
    show(table(("corpus", "language", "speakers", "segments", "hours"), rows, bold=[-1]))
    seconds = np.percentile(found.values("n_samples") / SAMPLE_RATE, list(QUANTILES))
    shown = ", ".join(f"{name} {value:.1f} s" for name, value in zip(QUANTILES.values(), seconds, strict=True))
    size = sum(record.bytes for record in records)
    console().print(cell(f"lengths  {shown}"))
    print(f"{len(records)} shards, {size / 1e6:,.1f} MB")
    rejects: Counter[str] = Counter()
    for record in finished_units(root):
        rejects.update(record.rejects)
    if rejects:
        listed = ", ".join(f"{reason}: {count:,}" for reason, count in rejects.most_common())
        console().print(cell(f"rejected {listed}"))
    return ExitCode.DONE


def _inspect(root: str, records: list[DoneRecord], key: str, limit: int) -> int:
    found: list[tuple[str, ...]] = []
    for row, shard in _rows(root, records):
        if key in row["key"]:
            at, length = (row[name] / SAMPLE_RATE for name in ("start", "n_samples"))
            place = (row["file_id"], f"{at:.2f}", row["speaker"], row["language"], shard)
            found.append((row["key"], f"{length:.2f}", *place))
            if len(found) == limit:
                break
    names = ("key", "seconds", "from", "at", "speaker", "language", "shard")
    if console().width >= WIDE:
        show(table(names, found, fold=True))
        return ExitCode.DONE
    for values in found:  # columns would be cut
        show_rows([(name, value) for name, value in zip(names, values, strict=True) if value])
        print()
    return ExitCode.DONE


def _rows(root: str, records: list[DoneRecord]) -> Iterator[tuple[dict[str, Any], str]]:
    for record in records:
        for row in read_index(root, record).to_pylist():
            yield row, record.shard


def _verify(root: str) -> int:
    with stages() as begin:
        faults = list(verify(root, begin=begin))
    for name, fault in faults:
        print(visible(f"{name}: {fault}"))
    shards = [name for part in ("", *SPLITS) for name in _shards(f"{root.rstrip('/')}/{part}".rstrip("/"), part)]
    if shards:
        bad = {name.removesuffix(".idx") for name, _ in faults}
        print(f"{sum(name not in bad for name in shards)} of {len(shards)} shards are intact")
    if not faults:
        print("every checksum matches")
    return ExitCode.FAILED if faults else ExitCode.DONE


def _shards(root: str, part: str) -> list[str]:
    tars = FileStore(root).names("", ".tar")
    return [f"{part}/{name}".lstrip("/") for name in tars]
