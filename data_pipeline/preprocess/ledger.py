"""Balances a data set: recordings and hours in against those out and rejected, by corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data_pipeline.corpora.records import RecordingId, Reject, recording_id, reject_file
from data_pipeline.preprocess.plan_file import Dropped
from data_pipeline.preprocess.unit_worker import FlowKey
from data_pipeline.preprocess.work_plan import WorkPlan
from data_pipeline.shards.records import DoneRecord

NOT_LEFT_OUT = ("in", "out", "recording")
"""Stages of a flow that are not rejections."""


@dataclass
class Ledger:
    """The outcome of all recordings of a data set. Stages are those of `unit_worker.Tally`, `dedup` and `discover`."""

    counts: Counter[FlowKey] = field(default_factory=Counter)
    samples: Counter[FlowKey] = field(default_factory=Counter)
    quarantine: list[Reject] = field(default_factory=list)
    """Rejects of discovery, and one for each recording without a segment."""
    imbalances: list[str] = field(default_factory=list)
    """Sums that do not agree; empty, unless there is a bug or a file was altered."""

    def total(self, stage: str, reason: str = "", corpus: str | None = None) -> tuple[int, int]:
        """Returns (count, samples) of a stage and reason over all languages, and all corpora unless one is named."""
        keys = [key for key in self.counts if key[2:] == (stage, reason) and corpus in (None, key[0])]
        return sum(self.counts[key] for key in keys), sum(self.samples[key] for key in keys)

    def _add(self, key: FlowKey, count: int, samples: int) -> None:
        self.counts[key] += count
        self.samples[key] += samples


def balance(
    plan: WorkPlan, records: Sequence[DoneRecord], rejects: Iterable[tuple[str, Reject]], found: Iterable[Reject]
) -> Ledger:
    """Adds up a data set and checks the sums.

    Args:
        plan: the plan of all jobs.
        records: the finished units.
        rejects: (unit, reject) of the finished units.
        found: rejects of discovery.

    Returns:
        The sums, the recordings without a segment, and sums that do not agree.
    """
    ledger = Ledger()
    for record in records:
        for *key, count, samples in record.flow:
            ledger._add((key[0], key[1], key[2], key[3]), count, samples)
        ledger.imbalances += _imbalances_of(record)
    finished = {record.unit for record in records} | {""}
    listed = [(unit, reject) for unit, reject in rejects if reject.recording or reject.stage == "decode"]
    found = list(found)
    newest = plan.newest({reject.recording_id for reject in [*found, *(reject for _, reject in listed)]})
    for unit, reject in listed:
        last = newest.get(reject.recording_id, unit)
        if last != unit and last in finished:
            _take_back(ledger, reject)
        else:
            ledger.quarantine.append(reject)
    expected = plan.planned(finished)
    for drop in plan.dropped():
        _add_listed(ledger, reject_file(drop.file, "dedup", drop.reason, samples=drop.samples))
    seen: set[tuple[RecordingId, str, int]] = set()
    for reject in found:
        row = (reject.recording_id, reject.reason, reject.row)
        if row in seen:  # two jobs have read the same table, with other settings of its columns
            continue
        seen.add(row)
        ledger.quarantine.append(reject)
        if reject.recording and reject.recording_id not in newest:
            newest[reject.recording_id] = ""
            expected[reject.corpus] += 1
            _add_listed(ledger, reject)
        else:
            ledger._add((reject.corpus, reject.language, "discover", reject.reason), 1, 0)
    if all(_has_outcomes(record) for record in records):
        ledger.imbalances += _imbalances_of_all(ledger, expected)
    ledger.quarantine.sort(key=lambda reject: (reject.stage != "discover", reject.corpus, reject.file_id, reject.row))
    return ledger


def _add_listed(ledger: Ledger, reject: Reject) -> None:
    """Counts a recording that is in no unit as input and as rejected."""
    corpus, language = reject.corpus, reject.language
    samples = reject.samples if reject.stage == "dedup" else 0
    ledger._add((corpus, language, "in", ""), 1, samples)
    ledger._add((corpus, language, reject.stage, reject.reason), 1, samples)
    ledger._add((corpus, language, "recording", f"{reject.stage}/{reject.reason}"), 1, 0)


def _take_back(ledger: Ledger, reject: Reject) -> None:
    """Removes the reject of a recording that a later unit processed again, where it is counted."""
    corpus, language = reject.corpus, reject.language
    outcome = (corpus, language, "recording", f"{reject.stage}/{reject.reason}")
    ledger._add((corpus, language, "in", ""), -1, -reject.samples)
    ledger._add((corpus, language, reject.stage, reject.reason), -1, -reject.samples)
    if ledger.counts[outcome] > 0:
        ledger._add(outcome, -1, 0)
    for key in [key for key, count in ledger.counts.items() if not count and not ledger.samples[key]]:
        del ledger.counts[key], ledger.samples[key]


def _has_outcomes(record: DoneRecord) -> bool:
    """Returns whether a record was written by a version that counts the outcome of each recording."""
    return any(stage == "recording" for _, _, stage, _, _, _ in record.flow)


def _imbalances_of(record: DoneRecord) -> list[str]:
    if not _has_outcomes(record):
        return []
    came = sum(samples for _, _, stage, _, _, samples in record.flow if stage == "in")
    went = sum(samples for _, _, stage, _, _, samples in record.flow if stage != "in")
    recordings = sum(row[4] for row in record.flow if row[2:4] == ("in", ""))
    outcomes = sum(row[4] for row in record.flow if row[2] == "recording")
    found = []
    if came != went:
        found.append(f"unit {record.unit}: {came:,} samples in, but {went:,} out or left out")
    if not record.files == recordings == outcomes:
        found.append(f"unit {record.unit}: {record.files:,} recordings, {recordings:,} in, {outcomes:,} accounted for")
    return found


def _imbalances_of_all(ledger: Ledger, expected: Counter[str]) -> list[str]:
    """Compares the recordings by corpus that a ledger counts with those that are planned or listed."""
    came = Counter(dict.fromkeys(expected, 0))
    listed: Counter[str] = Counter()
    for (corpus, _, stage, reason), count in ledger.counts.items():
        came[corpus] += count * (stage == "in" and not reason)
        listed[corpus] += count * (stage == "recording")
    return [
        f"corpus {corpus}: {expected[corpus]:,} recordings planned, {came[corpus]:,} in, {listed[corpus]:,} listed"
        for corpus in sorted(came)
        if not expected[corpus] == came[corpus] == listed[corpus]
    ]


def as_rows(dropped: Iterable[Dropped]) -> list[dict[str, object]]:
    """Returns the duplicates as plain rows, for duplicates.jsonl."""
    return [
        {
            "corpus": drop.file.corpus,
            "file_id": drop.file.file_id,
            "reason": drop.reason,
            "same_as": drop.same_as,
            "share": round(drop.share, 3),
            "offset_seconds": round(drop.offset_seconds, 2),
            "samples": drop.samples,
        }
        for drop in sorted(dropped, key=lambda drop: recording_id(drop.file))
    ]
