"""Long recordings are planned and processed in parts, with the same samples whichever parts are in a unit."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipeline.audio import vad
from data_pipeline.core.schema import load
from data_pipeline.core.storage import FileStore
from data_pipeline.corpora import long_recordings
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.recordings import Recordings, file_of
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.duplicate_search import DedupConfig
from data_pipeline.preprocess.fingerprints import find_duplicates, scan
from data_pipeline.preprocess.ledger import balance
from data_pipeline.preprocess.plan_file import Dropped
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.preprocess.work_plan import WorkPlan, freeze_plan, split_of
from data_pipeline.shards.records import DoneRecord
from tests.support.sounds import index_rows, path_config, sound

SECONDS = 47.3
PART = 10


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_recordings, "PART_SECONDS", PART)
    monkeypatch.setattr(long_recordings, "LONG_SECONDS", 2 * PART)
    monkeypatch.setattr(long_recordings, "LEAST_BYTES", 10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    soundfile.write(folder / "talk.flac", sound("talk", SECONDS), 16_000)
    stereo = np.stack([sound("left", 21.0, 44_100), sound("right", 21.0, 44_100)], 1)
    soundfile.write(folder / "music.wav", stereo, 44_100)
    soundfile.write(folder / "short.flac", sound("short", 7.0), 16_000)
    soundfile.write(folder / "other.ogg", sound("other", 25.0), 16_000)
    return folder


def job(folder: Path, out: Path, **values: Any) -> PreprocessConfig:
    return path_config(folder, out, **{"cut": {"max_seconds": 4.0}, "dedup": {"exact": False}, **values})


def planned(config: PreprocessConfig, in_parts: bool = True) -> WorkPlan:
    return freeze_plan(FileStore(config.out), discover(config.corpus, in_parts=in_parts).recordings, config)


def processed(config: PreprocessConfig, in_parts: bool = True) -> list[DoneRecord]:
    return [process_unit(unit, config).record for unit in planned(config, in_parts).work_units()]


def members(config: PreprocessConfig) -> dict[str, bytes]:
    """Returns the members of all shards of a data set."""
    found: dict[str, bytes] = {}
    for path in sorted(Path(config.out).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found, "a key in two shards"
                content = tar.extractfile(member)
                found[member.name] = content.read() if content else b""
    return found


def flow(records: list[DoneRecord], stage: str) -> int:
    return sum(row[5] for record in records for row in record.flow if row[2] == stage)


def test_long_recordings_of_exact_codecs_become_parts(folder: Path, tmp_path: Path) -> None:
    config = job(folder, tmp_path / "out")
    files = {file.file_id: file for unit in planned(config).work_units() for file in unit.files}
    assert sorted(files) == [
        "music.wav#t=0,10", "music.wav#t=10", "other.ogg", "short.flac",
        "talk.flac#t=0,10", "talk.flac#t=10,20", "talk.flac#t=20,30", "talk.flac#t=30,40", "talk.flac#t=40",
    ]  # fmt: skip
    assert {file.source_id for file in files.values()} == {"music.wav", "other.ogg", "short.flac", "talk.flac"}
    assert files["talk.flac#t=40"].seconds == pytest.approx(SECONDS - 40)
    assert files["talk.flac#t=10,20"].part == (10, 20)
    assert files["short.flac"].part is files["other.ogg"].part is None


@pytest.mark.parametrize("heard", [False, True], ids=["cut", "vad"])
def test_shards_hold_the_same_bytes_however_parts_are_spread_over_units(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    def probability(self: vad.Detector, window: np.ndarray) -> float:
        """A detector whose state decays slowly, as Silero's does."""
        state = 0.9 * getattr(self, "level", 0.0) + 0.1 * float(np.abs(window).mean())
        self.level = state  # type: ignore[attr-defined]
        return min(10 * state, 1.0)

    monkeypatch.setattr(vad.Detector, "probability", probability)
    values = {"vad": {"enabled": heard, "min_silence_seconds": 0.1}}
    made = []
    for shard_mb in (0.15, 0.5, 100.0):
        config = job(folder, tmp_path / f"{shard_mb}", shard_mb=shard_mb, **values)
        records = processed(config)
        made.append((len(records), members(config), flow(records, "in")))
    assert [units for units, _, _ in made] == sorted((units for units, _, _ in made), reverse=True)
    assert made[0][0] >= 8 > made[1][0] > made[2][0]
    assert made[0][1:] == made[1][1:] == made[2][1:]
    assert made[0][2] == pytest.approx(16_000 * (SECONDS + 21 + 7 + 25), abs=40)


def test_parts_have_the_audio_and_keys_of_the_whole_recording(folder: Path, tmp_path: Path) -> None:
    """Pieces of 2.5 s do not cross the borders of parts of 10 s; the last two of each recording are equally long."""
    parts, whole = (job(folder, tmp_path / name, cut={"max_seconds": 2.5}, shard_mb=9.0) for name in ("parts", "whole"))
    processed(parts)
    processed(whole, in_parts=False)
    found, expected = members(parts), members(whole)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {name for name in found if "music" in name}
    rows = [row for row in index_rows(tmp_path / "parts") if "talk" in str(row["key"])]
    assert {row["file_id"] for row in rows} == {"talk.flac"}
    whole_talk, _ = soundfile.read(folder / "talk.flac", dtype="int16")
    for row in rows:
        name = f"{row['key']}.flac"
        (tmp_path / "one.flac").write_bytes(found[name])
        start, length = int(row["start"]), int(row["n_samples"])
        np.testing.assert_array_equal(
            soundfile.read(tmp_path / "one.flac", dtype="int16")[0], whole_talk[start : start + length]
        )


@pytest.mark.parametrize("shard_mb", [0.1, 100.0])
def test_spans_belong_to_the_part_in_which_they_begin(folder: Path, tmp_path: Path, shard_mb: float) -> None:
    spans = [(0.5, 3.0, "a"), (8.0, 12.5, "over the border"), (9.0, 31.0, "long"), (33.0, 33.9, "b"), (46.0, 60.0, "c")]
    table = tmp_path / "table.jsonl"
    rows = [
        {"path": str(folder / "talk.flac"), "begin": begin, "end": end, "text": text, "speaker": "s"}
        for begin, end, text in [*spans, (70.0, 71.0, "behind the end")]
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for in_parts in (True, False):
        corpus = {"name": "manifest", "path": str(table), "root": str(folder), "corpus": "c"}
        config = load(PreprocessConfig, {"out": str(tmp_path / f"{in_parts}"), "corpus": corpus, "shard_mb": shard_mb})
        if in_parts:
            parts = [file.file_id for unit in planned(config).work_units() for file in unit.files]
            assert sorted(parts) == ["talk.flac#t=0,30", "talk.flac#t=30,40", "talk.flac#t=40"]
        records = processed(config, in_parts)
        assert flow(records, "in") == sum(flow(records, stage) for stage in ("out", "cut", "vad", "filter", "decode"))
        total = Counter({stage: flow(records, stage) for stage in ("in", "out", "cut")})
        made[in_parts] = members(config), total
        rejected = [row for record in records for row in record.flow if row[3] == "beyond_end"]
        assert [row[4] for row in rejected] == [1]
    assert made[True][0] == made[False][0]
    # the second that a span takes of the next part is counted there as well, and as shared by two segments
    assert made[True][1] - made[False][1] == Counter({"in": 16_000, "cut": 16_000})


def test_parts_of_a_recording_without_speaker_are_in_one_split(folder: Path, tmp_path: Path) -> None:
    config = job(folder, tmp_path / "out", split={"valid": 0.3, "test": 0.3})
    splits = [
        split_of(row, config) for row in discover(config.corpus, in_parts=True).recordings if "talk" in row.file_id
    ]
    assert len(splits) == 5
    assert len(set(splits)) == 1


def test_a_recording_that_an_earlier_version_planned_whole_stays_so(folder: Path, tmp_path: Path) -> None:
    config = job(folder, tmp_path / "out")
    before = planned(config, in_parts=False)
    after = planned(config)
    assert [unit.name for unit in after.units] == [unit.name for unit in before.units]
    assert after.changed_files == after.relabelled == 0


def test_a_damaged_part_is_rejected_alone(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    soundfile.write(corpus / "talk.flac", sound("talk", SECONDS), 16_000)
    content = bytearray((corpus / "talk.flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3_000] = bytes(3_000)
    (corpus / "talk.flac").write_bytes(content)
    records = processed(job(corpus, tmp_path / "out"))
    rejects = Counter[str]()
    for record in records:
        rejects.update(record.rejects)
    assert set(rejects) <= {"decode/corrupt", "decode/truncated"}
    assert 1 <= sum(rejects.values()) <= 2
    assert len({int(row["start"]) // 160_000 for row in index_rows(tmp_path / "out")}) >= 3


def test_hours_and_recordings_balance_and_duplicates_are_found_in_parts(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "talk.flac").symlink_to(folder / "talk.flac")
    (corpus / "same.flac").symlink_to(folder / "talk.flac")
    config = job(corpus, tmp_path / "out", shard_mb=9.0)
    found, store = discover(config.corpus, in_parts=True), FileStore(config.out)

    def duplicates(fresh: Recordings, plan: WorkPlan) -> Sequence[Dropped]:
        scan([file_of(row) for row in fresh], False, config.out)
        return find_duplicates(config.out, DedupConfig(exact=True), fresh, ())

    plan = freeze_plan(store, found.recordings, config, find_duplicates=duplicates)
    records = [process_unit(unit, config).record for unit in plan.work_units()]
    dropped = sorted((drop.file.file_id, drop.same_as) for drop in plan.dropped())
    times = [["t=0,10"] * 2, ["t=10,20"] * 2, ["t=20,30"] * 2, ["t=30,40"] * 2, ["t=40"] * 2]
    assert sorted([name.split("#")[1], kept.split("#")[1]] for name, kept in dropped) == times
    ledger = balance(plan, records, (), ())
    assert ledger.imbalances == []
    assert ledger.total("in") == (10, 2 * round(SECONDS * 16_000))
    assert planned(config).units == plan.units, "a later job finds nothing new"
