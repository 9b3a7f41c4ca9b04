"""Input equals output plus rejects, in recordings and hours, for each corpus."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import load
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import AudioFile
from data_pipeline.corpora.recordings import row_of
from data_pipeline.corpora.records import Reject
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.job import preprocess
from data_pipeline.preprocess.ledger import balance
from data_pipeline.preprocess.plan_file import Dropped, TableWriter, WorkUnit
from data_pipeline.preprocess.summary import Summary
from data_pipeline.preprocess.verify import verify
from data_pipeline.preprocess.work_plan import WorkPlan, read_plan
from data_pipeline.shards.records import DoneRecord
from tests.support.edge_case_manifests import one_recording, record_of, samples_of
from tests.support.sounds import many, path_config, write_corpus

HOUR = 16_000 * 3600


def listed_in(summary: Summary) -> Counter[str]:
    """Counts recordings and rows of the quarantine list by stage and reason."""
    rows = [json.loads(line) for line in Path(summary.quarantine).read_text().splitlines()]
    return Counter(f"{row['stage']}/{row['reason']}" for row in rows)


def check(summary: Summary, duplicates: int = 0) -> None:
    """Asserts that recordings and hours balance."""
    assert summary.imbalances == ()
    assert summary.problem == ""
    assert summary.files == summary.files_used + summary.quarantined + duplicates
    left_out = sum(hours for _, hours in summary.rejects.values())
    assert summary.hours_in + summary.hours_overlapping == pytest.approx(summary.hours_out + left_out, abs=1e-9)


@pytest.mark.usefixtures("local_ray")
def test_recordings_and_hours_balance(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(6) | {"s/short.wav": 0.2, "s/long.flac": 70.0})
    soundfile.write(corpus / "s" / "hush.wav", np.zeros(32_000), 16_000)
    (corpus / "s" / "broken.flac").write_bytes(b"fLaC" * 99)
    (corpus / "s" / "gone.wav").symlink_to("nowhere")
    shutil.copy(corpus / "speaker0" / "clip000.flac", corpus / "s" / "again.flac")
    quiet = soundfile.read(corpus / "speaker1" / "clip001.flac", dtype="int16")[0] // 3
    soundfile.write(corpus / "s" / "quieter.flac", quiet, 16_000)
    (corpus / "s" / "notes.txt").touch()
    config = path_config(corpus, tmp_path / "out", dedup={"exact": True, "near": True})
    summary = preprocess(config, progress=False)
    check(summary, duplicates=2)
    assert (summary.files, summary.files_used) == (13, 7)
    assert listed_in(summary) == {
        "cut/too_short": 1,
        "filter/silence": 1,
        "decode/unreadable": 1,
        "discover/broken_link": 1,
    }
    assert summary.rejects["dedup/exact"] == (1, pytest.approx(2 / 3600))
    assert summary.rejects["dedup/near"] == (1, pytest.approx(2 / 3600))
    assert summary.skipped == {".txt": 1}
    shown = dict(summary.rows())
    assert shown["files not taken"] == "1: .txt 1"
    rows = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert [(Path(row["file_id"]).name, row["reason"]) for row in rows] == [
        ("clip000.flac", "exact"),
        ("clip001.flac", "near"),
    ]
    assert rows[1]["share"] > 0.9
    assert rows[1]["offset_seconds"] == pytest.approx(0.0, abs=0.05)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Duplicates (2)" in page
    assert "clip001.flac" in page
    again = preprocess(config, progress=False)
    check(again, duplicates=2)
    assert again.rejects == summary.rejects
    assert not list(verify(str(tmp_path / "out")))


def test_recordings_without_speech_are_rejects_and_pauses_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speech(blocks: Any, longest: int, config: object, lead: object) -> Any:
        assert lead is None
        wave = np.concatenate(list(blocks))
        if wave.any():
            yield 0, wave[: len(wave) // 2]

    monkeypatch.setattr("data_pipeline.preprocess.unit_worker.vad.speech", speech)
    corpus = write_corpus(tmp_path / "corpus", {"a.wav": 2.0, "b.wav": 4.0})
    for name in ("music.wav", "hum.wav"):
        soundfile.write(corpus / name, np.zeros(48_000), 16_000)
    samples = samples_of(tmp_path / "out", {"name": "path", "path": str(corpus)}, vad={"enabled": True})
    assert [sample["file_id"] for sample, _ in samples] == ["a.wav", "b.wav"]
    record = record_of(tmp_path / "out")
    flow = {row[2:4]: row[4:] for row in record.flow}
    assert flow["vad", "no_speech"] == (2, 96_000)
    assert flow["vad", "pause"] == (2, 48_000)
    assert flow["recording", "vad/no_speech"] == (2, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "_rejects" / f"{record.unit}.jsonl").open()]
    assert [(row["file_id"], row["reason"], row["recording"]) for row in rows] == [
        ("hum.wav", "no_speech", True),
        ("music.wav", "no_speech", True),
    ]


@pytest.mark.usefixtures("local_ray")
def test_overlapping_spans_and_invalid_rows_balance(tmp_path: Path) -> None:
    rows = [
        {"begin": 0.0, "end": 10.0},
        {"begin": 5.0, "end": 12.0},
        {"begin": 19.0, "end": 25.0, "text": "late"},
        {"begin": 30.0, "end": 31.0},
        {"begin": 3.0, "end": 3.0},
        {"audio_filepath": "gone.flac", "begin": 0.0, "end": 1.0},
    ]
    path = one_recording(tmp_path, rows)
    values = {"out": str(tmp_path / "out"), "corpus": {"name": "manifest", "path": str(path)}}
    summary = preprocess(load(PreprocessConfig, values), progress=False)
    assert summary.imbalances == ()
    assert (summary.files, summary.files_used, summary.segments) == (2, 1, 3)
    assert summary.hours_overlapping == pytest.approx(5 / 3600)
    assert summary.rejects["cut/not_marked"][1] == pytest.approx(7 / 3600)
    assert summary.hours_in + summary.hours_overlapping == pytest.approx(summary.hours_out + 7 / 3600)
    assert {name: count for name, (count, _) in summary.rejects.items()} == {
        "cut/beyond_end": 1,
        "cut/not_marked": 1,
        "discover/bad_span": 1,
        "discover/vanished": 1,
        "text/trimmed": 1,
    }


def made_record(unit: str, flow: list[tuple[str, str, str, str, int, int]], files: int) -> DoneRecord:
    return DoneRecord(unit, "", "", 0, "", 0, 0, files=files, flow=tuple(flow))


def flow_of(count: int, samples: int, outcome: str = "used") -> list[tuple[str, str, str, str, int, int]]:
    stage, _, reason = outcome.partition("/")
    went = ("c", "", "out", "", count, samples) if outcome == "used" else ("c", "", stage, reason, count, samples)
    return [("c", "", "in", "", count, samples), went, ("c", "", "recording", outcome, count, 0)]


def plan_of(folder: Path, *generations: tuple[str, list[str]], dropped: list[str] | None = None) -> WorkPlan:
    """Returns a plan with a table for each (unit, names of its recordings), and one of duplicates, in a new folder."""
    store = FileStore(tempfile.mkdtemp(dir=folder))
    duplicates = [Dropped(AudioFile(name, name, "c"), "exact", "c/a", samples=HOUR) for name in dropped or []]
    for unit, names in generations:
        add_table(store, [WorkUnit(unit * 16, tuple(AudioFile(name, name, "c") for name in names))])
    if duplicates:
        add_table(store, [], duplicates)
    return read_plan(store)


def add_table(store: FileStore, units: Sequence[WorkUnit], dropped: Sequence[Dropped] = ()) -> None:
    """Adds a generation to the plan of a data set."""
    with store.scratch() as folder:
        writer = TableWriter(folder / "plan")
        for unit in units:
            writer.add_unit(unit.name, unit.split, [row_of(file) for file in unit.files])
        for drop in dropped:
            writer.add_dropped(drop)
        sha256 = writer.close()
        store.put(folder / "plan", f"_plan/{sha256[:16]}.parquet")
    generation = len(store.names("_plan", ".sha256"))
    store.create(f"_plan/{generation:04d}.sha256", sha256.encode())


def test_imbalances_are_found(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("0", ["a", "b"]))
    assert balance(plan, [made_record("0" * 16, flow_of(2, HOUR), 2)], [], []).imbalances == []
    for flow, files in (
        ([*flow_of(2, HOUR), ("c", "", "cut", "x", 1, 7)], 2),  # output samples that no input accounts for
        (flow_of(2, HOUR)[:1] + flow_of(2, HOUR)[2:], 2),  # neither output nor reject
        (flow_of(1, HOUR), 1),  # a missing recording
        ([*flow_of(2, HOUR)[:2], ("c", "", "recording", "used", 1, 0)], 2),  # a recording without an outcome
    ):
        assert balance(plan, [made_record("0" * 16, flow, files)], [], []).imbalances
    old = [row for row in flow_of(2, HOUR) if row[2] != "recording"]
    assert balance(plan, [made_record("0" * 16, old, 2)], [], []).imbalances == [], "written by an earlier version"


def test_a_later_unit_replaces_the_failure_of_an_earlier_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("0", ["a", "b"]), ("1", ["b"]))
    broken = Reject("b", "b", "c", "", "decode", "truncated", samples=5, recording=True)
    first = [("c", "", "in", "", 2, HOUR + 5), ("c", "", "out", "", 1, HOUR), ("c", "", "decode", "truncated", 1, 5)]
    outcomes = [("c", "", "recording", "used", 1, 0), ("c", "", "recording", "decode/truncated", 1, 0)]
    earlier, later = made_record("0" * 16, [*first, *outcomes], 2), made_record("1" * 16, flow_of(1, HOUR), 1)
    waiting = balance(plan, [earlier], [("0" * 16, broken)], [])
    assert (waiting.total("in"), waiting.quarantine) == ((2, HOUR + 5), [broken]), "the retry is not finished"
    done = balance(plan, [earlier, later], [("0" * 16, broken)], [])
    assert (done.total("in"), done.total("out"), done.quarantine) == ((2, 2 * HOUR), (2, 2 * HOUR), [])
    assert done.imbalances == []
    duplicate = balance(plan_of(tmp_path, ("0", ["a", "b"]), dropped=["b"]), [earlier], [("0" * 16, broken)], [])
    assert (duplicate.total("in"), duplicate.total("dedup", "exact")) == ((2, 2 * HOUR), (1, HOUR))
    assert duplicate.imbalances == []


def test_a_row_that_two_jobs_reject_counts_once(tmp_path: Path) -> None:
    """A table may be read again with other settings of its columns, and may name a missing recording twice."""
    plan, made = plan_of(tmp_path, ("0", ["a", "b"])), [made_record("0" * 16, flow_of(2, HOUR), 2)]
    gone = Reject("gone", "gone", "c", "", "discover", "vanished", recording=True, row=3)
    again = dataclasses.replace(gone, language="en")
    once, twice = balance(plan, made, [], [gone]), balance(plan, made, [], [gone, again])
    assert (twice.imbalances, twice.quarantine, twice.counts) == ([], [gone], once.counts)
    elsewhere = balance(plan, made, [], [gone, dataclasses.replace(gone, row=7)])
    assert elsewhere.imbalances == []
    assert elsewhere.total("in")[0] == once.total("in")[0] == 3
    assert [reject.row for reject in elsewhere.quarantine] == [3, 7]


@pytest.mark.usefixtures("local_ray")
def test_names_in_records_and_plans_cannot_escape_the_data_set(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(3))
    config = path_config(corpus, tmp_path / "out")
    preprocess(config, progress=False)
    important = tmp_path / "important.json"
    important.write_text("{}")
    done = next((tmp_path / "out" / "_done").iterdir())
    plan = tmp_path / "out" / "_plan" / "0000.sha256"
    good = {done: done.read_bytes(), plan: plan.read_bytes()}
    record = json.loads(good[done])
    for altered in (
        {done: {**record, "unit": "../../important", "shard": "gone.tar"}},
        {done: {**record, "shard": "../important.json"}},
        {plan: "../../important"},
        {plan: f"{'/' * 64}"},
    ):
        [(path, content)] = altered.items()
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=path.name):
            preprocess(config, progress=False)
        assert list(verify(str(tmp_path / "out"), decode=False))
        path.write_bytes(good[path])
    assert important.read_text() == "{}"
    assert preprocess(config, progress=False).units_done == 0


def test_a_plan_cannot_refer_to_other_folders(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    for unit, folder in (("0" * 16, "../x"), ("../x", ""), ("0" * 15, ""), ("0" * 16, "/etc")):
        store.remove("_plan/0000.sha256")
        add_table(store, [WorkUnit(unit, (AudioFile("a", "a", "c"),), folder)])
        with pytest.raises(ValueError, match="not a name that a plan gives"):
            read_plan(store)


@pytest.mark.usefixtures("local_ray")
def test_markup_and_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    out = tmp_path / "out [" / "2]"
    corpus = tmp_path / "cor\x1b]0;title\x07pus"
    write_corpus(corpus, {"[/b]\x1b[31mred/a.wav": 1.0, "s/b.wav": 1.0})
    (corpus / "s" / "\x1b[2Jbroken.wav").write_bytes(b"RIFF")
    (corpus / "s" / "notes.\x1b[1m").touch()
    summary = preprocess(path_config(corpus, out), progress=False)
    assert summary.segments == 2
    assert "\x1b" not in "".join(f"{name}{value}" for name, value in summary.rows())
    page = (out / "report.html").read_text()
    assert "\x1b" not in page
    assert "\\x1b[2Jbroken.wav" in page
