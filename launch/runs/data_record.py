"""`data.json` of a run: hours, corpora, languages and licences of its shards, also for when these have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.json_object import read_object
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.shards.licences import read_licences
from data_pipeline.shards.records import DoneRecord, done_records

DATA = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run: hours of audio, names of corpora and languages, and licences."""

    hours: float = 0.0
    corpora: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    licences: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Licence, "" where it is not known -> corpora."""


def describe(records: Sequence[DoneRecord]) -> DataRecord:
    """Returns the summary of shards; their licences are read from beside them."""
    flow = [row for record in records for row in record.flow]
    corpora, languages = (tuple(sorted({str(row[column]) for row in flow if row[column]})) for column in (0, 1))
    licences: dict[str, set[str]] = {}
    for root in dict.fromkeys(record.root for record in records):
        known = read_licences(root)
        for corpus in {str(row[0]) for record in records if record.root == root for row in record.flow if row[0]}:
            licences.setdefault(known.get(corpus, ""), set()).add(corpus)
    hours = sum(record.samples for record in records) / SAMPLE_RATE / 3600
    return DataRecord(hours, corpora, languages, {name: tuple(sorted(found)) for name, found in licences.items()})


def write(run: Path, records: Sequence[DoneRecord]) -> None:
    """Writes the summary of a run's shards into its folder. Raises OSError."""
    write_json(run / DATA, asdict(describe(records)))


def read(run: Path, shards: Sequence[str]) -> DataRecord:
    """Returns the recorded summary; of a run without one that of its shards, which is empty if they are not there."""
    try:
        values = read_object(run / DATA)
        return DataRecord(
            float(values["hours"]),
            tuple(map(str, values["corpora"])),
            tuple(map(str, values["languages"])),
            {str(name): tuple(map(str, corpora)) for name, corpora in values["licences"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a run of an earlier version
    try:
        return describe(done_records(shards))
    except (ValueError, OSError):
        return DataRecord()
