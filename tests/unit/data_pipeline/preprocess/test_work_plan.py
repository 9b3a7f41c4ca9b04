"""Plans are the same whether they fit into memory or not, and later jobs add to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_pipeline.core import external_sort
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import AudioFile, Span
from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.recordings import recordings_of
from data_pipeline.corpora.records import Reject
from data_pipeline.preprocess import new_recordings, plan_file, work_plan
from data_pipeline.preprocess.config import PreprocessConfig, SplitConfig, content_settings
from data_pipeline.preprocess.plan_file import Dropped
from data_pipeline.preprocess.work_plan import WRITER_VERSION, WorkPlan, freeze_plan, read_plan, split_of


def job(folder: Path, **fields: Any) -> PreprocessConfig:
    return PreprocessConfig(out=str(folder), corpus=PathCorpus(path="-"), **fields)


def recordings(count: int, corpus: str = "c") -> list[AudioFile]:
    draw = random.Random(1)
    made = []
    for number in range(count):
        spans = (Span(0, 16_000, text=f"{number}"),) if number % 7 == 0 else ()
        file = AudioFile(f"/data/{number}.wav", f"{number}.wav", corpus, speaker=f"s{number % 20}", spans=spans)
        size, labels = draw.randrange(20_000, 900_000), {"room": f"{number % 3}"}
        image = "/data/a.png" if number % 11 == 0 else ""
        made.append(dataclasses.replace(file, size=size, mtime=str(number), labels=labels, image=image))
    return made


def frozen(config: PreprocessConfig, files: Iterable[AudioFile], **more: Any) -> WorkPlan:
    return freeze_plan(FileStore(config.out), recordings_of(files), config, **more)


def content(plan: WorkPlan) -> list[tuple[str, str, list[AudioFile]]]:
    return [(unit.name, unit.split, list(unit.files)) for unit in plan.work_units()]


def hashed(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]


def grouped_in_memory(files: Sequence[AudioFile], config: PreprocessConfig) -> list[tuple[str, str, list[AudioFile]]]:
    """Groups recordings as documented, with all of them in memory; all are WAV, and shards are FLAC."""
    sets: dict[str, list[AudioFile]] = {}
    for file in sorted(files, key=lambda file: hashed(file.corpus, file.file_id)):
        sets.setdefault(split_of(file, config), []).append(file)  # type: ignore[arg-type]
    units = []
    for split, ordered in sets.items():
        sizes = [file.size / 32_000 * 18_000 for file in ordered]
        limit = min(config.shard_mb * 1e6, max(sum(sizes) / config.min_shards, 1e6))
        parts, held = [[ordered[0]]], sizes[0]
        for file, size in zip(ordered[1:], sizes[1:], strict=True):
            if held + size > limit:
                parts.append([])
                held = 0.0
            parts[-1].append(file)
            held += size
        for part in parts:
            sources = []
            for file in part:
                spans = [
                    {name: getattr(span, name) for name in ("start", "stop", "speaker", "text", "labels")}
                    for span in file.spans
                ]
                source = f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}"
                source += json.dumps(spans, sort_keys=True) if spans else ""
                sources.append(source + (f"\x1f{file.image}" if file.image else ""))
            settings = json.dumps(content_settings(config), sort_keys=True)
            units.append((hashed(str(WRITER_VERSION), settings, *sources), split, part))
    return sorted(units, key=lambda unit: unit[0])


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sorted, written and looked up a few at a time."""
    monkeypatch.setattr(external_sort, "ROWS", 17)
    monkeypatch.setattr(external_sort, "BLOCK", 5)
    monkeypatch.setattr(plan_file, "ROW_GROUP", 13)
    monkeypatch.setattr(work_plan, "CHUNK", 7)
    monkeypatch.setattr(new_recordings, "CHUNK", 7)


@pytest.mark.parametrize("split", [SplitConfig(), SplitConfig(valid=0.2, test=0.2)])
@pytest.mark.usefixtures("little_memory")
def test_a_plan_larger_than_memory_is_the_same(tmp_path: Path, split: SplitConfig) -> None:
    config, files = job(tmp_path / "out", split=split, shard_mb=3.0), recordings(200)
    expected = grouped_in_memory(files, config)
    random.Random(2).shuffle(files)
    assert content(frozen(config, files)) == expected
    assert content(read_plan(FileStore(config.out))) == expected
    dry = frozen(job(tmp_path / "dry", split=split, shard_mb=3.0), files, dry=True)
    assert [(unit.name, unit.split, unit.files) for unit in dry.units] == [(n, s, len(part)) for n, s, part in expected]
    assert not (tmp_path / "dry").exists()
    again = frozen(config, files)
    assert (len(again.tables), again.changed_files, again.relabelled) == (1, 0, 0)
    seconds = {name: sum(file.size for file in part) / 32_000 for name, _, part in expected}
    assert {unit.name: unit.seconds for unit in again.units} == pytest.approx(seconds)


@pytest.mark.usefixtures("little_memory")
def test_a_later_job_adds_what_is_new(tmp_path: Path) -> None:
    config, files = job(tmp_path, shard_mb=3.0), recordings(120)
    before = content(frozen(config, files[:80]))
    later = [*files]
    later[3] = dataclasses.replace(files[3], size=1)
    later[4] = dataclasses.replace(files[4], speaker="another")
    # the same files under the ids of earlier versions, and one that failed
    later[5] = dataclasses.replace(files[5], file_id="./5.wav")
    later[6] = dataclasses.replace(files[6], file_id="/data/6.wav", path="/data/../data/6.wav")
    later[7] = dataclasses.replace(files[7], size=2)
    failures = {("c", "7.wav"): Reject("", "7.wav", "c", "", "decode", "truncated")}
    plan = frozen(config, later, failures=failures)
    added = [unit for unit in content(plan) if unit not in before]
    assert len(added) + len(before) == len(plan.units)
    assert {file.file_id for _, _, part in added for file in part} == {"7.wav", *(f"{n}.wav" for n in range(80, 120))}
    assert (plan.changed_files, plan.relabelled, len(plan.tables)) == (1, 1, 2)
    new_unit = next(name for name, _, part in added if any(file.file_id == "7.wav" for file in part))
    assert plan.newest({("c", "7.wav"), ("c", "8.wav"), ("d", "7.wav")})["c", "7.wav"] == new_unit
    assert [number for number, _ in plan.retried["c", "7.wav"]] == [0, 1]
    assert plan.planned({unit.name for unit in plan.units}) == {"c": 120}


def test_duplicates_are_in_no_unit(tmp_path: Path) -> None:
    files = recordings(30)
    drops = [Dropped(file, "near", "c/0.wav", 0.75, -1.5, 16_000) for file in files[10:12]]
    plan = frozen(job(tmp_path), files, find_duplicates=lambda fresh, plan: drops)
    assert list(plan.dropped()) == drops
    assert list(read_plan(FileStore(str(tmp_path))).dropped()) == drops
    assert {file.file_id for _, _, part in content(plan) for file in part} == {
        file.file_id for file in [*files[:10], *files[12:]]
    }
    assert plan.newest({("c", "10.wav")}) == {("c", "10.wav"): ""}
    changed = [dataclasses.replace(file, size=5) if file is files[10] else file for file in files]
    later = frozen(job(tmp_path), changed)
    assert list(later.dropped()) == drops[1:], "the changed one is processed"


def test_tables_of_earlier_versions_are_read(tmp_path: Path) -> None:
    config, files = job(tmp_path), [dataclasses.replace(file, spans=(), image="") for file in recordings(50)]
    expected = content(frozen(config, files))
    [table] = (tmp_path / "_plan").glob("*.parquet")
    pq.write_table(pq.read_table(table).drop_columns(["spans", "share", "offset", "samples", "image", "part"]), table)
    sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
    table.rename(table.with_name(f"{sha256[:16]}.parquet"))
    (tmp_path / "_plan" / "0000.sha256").write_text(sha256)
    assert content(read_plan(FileStore(str(tmp_path)))) == expected
    assert frozen(config, files).relabelled == 0


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "ROWS", 200)
    monkeypatch.setattr(external_sort, "BLOCK", 20)
    monkeypatch.setattr(plan_file, "ROW_GROUP", 200)

    def peak(count: int) -> int:
        files = recordings(count)
        tracemalloc.start()
        try:
            frozen(job(tmp_path / str(count), shard_mb=3.0), iter(files))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1_000), peak(6_000)
    assert (large - small) / 5_000 < 200, (
        "units, a few hundred bytes each, are in memory; recordings, 2 kB each, are not"
    )
