"""Preprocessing jobs, from a corpus to shards, on a real local Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import webdataset

from data_pipeline.core.ray_tasks import run_tasks
from data_pipeline.core.schema import ConfigError, load
from data_pipeline.preprocess import job
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.job import plan_units, preprocess
from data_pipeline.preprocess.plan_file import PlannedUnit
from data_pipeline.shards.licences import read_licences
from tests.support.sounds import contents, index_rows, many, path_config, sound, write_corpus

pytestmark = pytest.mark.usefixtures("local_ray")


def test_good_files_become_shards_and_a_broken_one_is_listed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(10) | {"speaker9/long.flac": 70.0, "speaker9/short.wav": 0.2})
    (corpus / "speaker0" / "broken.flac").write_bytes(b"fLaC, or so it says" * 99)
    soundfile.write(corpus / "speaker9" / "hush.wav", np.zeros(32_000), 16_000)
    soundfile.write(corpus / "speaker9" / "studio.wav", np.stack([sound("l", 3, 48_000)] * 2, 1), 48_000)
    summary = preprocess(path_config(corpus, tmp_path / "out"), progress=False)
    assert summary.exit_code == 0
    assert (summary.files, summary.segments, summary.quarantined) == (15, 14, 3)
    assert summary.rejects["cut/too_short"] == (1, pytest.approx(0.2 / 3600))
    assert summary.rejects["filter/silence"] == (1, pytest.approx(2 / 3600))
    assert summary.rejects["decode/unreadable"][0] == 1
    assert summary.hours_in == pytest.approx((20 + 70 + 0.2 + 2 + 3) / 3600)
    assert summary.hours_out == pytest.approx((20 + 70 + 3) / 3600)
    listed = [json.loads(line) for line in Path(summary.quarantine).read_text().splitlines()]
    assert [(row["file_id"], row["stage"], row["reason"]) for row in listed] == [
        ("speaker0/broken.flac", "decode", "unreadable"),
        ("speaker9/hush.wav", "filter", "silence"),
        ("speaker9/short.wav", "cut", "too_short"),
    ]
    pieces = sorted(
        (row["start"], row["n_samples"]) for row in index_rows(tmp_path / "out") if "long" in str(row["key"])
    )
    assert pieces == [(0, 480_000), (480_000, 320_000), (800_000, 320_000)]
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    seen = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert sorted(seen) == sorted(str(row["key"]) for row in index_rows(tmp_path / "out"))
    assert len(set(seen)) == len(seen) == 14


def test_a_repeat_does_nothing_and_another_output_folder_gets_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(20))
    config = path_config(corpus, tmp_path / "out")
    summary = preprocess(config, progress=False)
    assert summary.workers >= 1
    assert 0 < summary.busy <= 1
    first = contents(tmp_path / "out")
    again = preprocess(config, progress=False)
    assert (again.units_done, again.units_before) == (0, again.shards)
    assert contents(tmp_path / "out") == first
    preprocess(path_config(corpus, tmp_path / "twin"), progress=False)
    assert contents(tmp_path / "twin") == first
    licensed = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, licence="CC-BY-4.0"))
    assert preprocess(licensed, progress=False).units_done == 0, "a licence added later changes no shard"
    assert read_licences(str(tmp_path / "out")) == {"corpus": "CC-BY-4.0"}
    kept = {name: content for name, content in contents(tmp_path / "out").items() if "_licences" not in name}
    assert kept == first


def test_licences_of_a_manifest_are_kept_by_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {f"{name}.wav": 2.0 for name in "abcd"})
    rows = ["a.wav\tone\tCC0-1.0", "b.wav\tone\tCC-BY-4.0", "c.wav\tone\tCC0-1.0", "d.wav\ttwo\t"]
    (tmp_path / "corpus" / "list.tsv").write_text("\n".join(["path\tcorpus\tlicence", *rows]) + "\n")
    corpus = {"name": "manifest", "path": str(tmp_path / "corpus" / "list.tsv"), "licence": "MIT"}
    preprocess(load(PreprocessConfig, {"out": str(tmp_path / "out"), "corpus": corpus}), progress=False)
    assert read_licences(str(tmp_path / "out")) == {"one": "CC-BY-4.0, CC0-1.0", "two": "MIT"}


def test_new_files_do_not_change_finished_shards(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(20))
    config = path_config(corpus, tmp_path / "out")
    preprocess(config, progress=False)
    first = contents(tmp_path / "out")
    write_corpus(corpus, {"speaker7/new.flac": 3.0})
    later = preprocess(config, progress=False)
    second = contents(tmp_path / "out")
    assert later.files == 21
    assert later.units_done == 1
    assert ("recordings", "21, of which 1 by this job") in later.rows()
    assert (later.new_segments, round(later.new_hours * 3600, 2)) == (1, 3.0)
    changed = {name for name in first if second[name] != first[name]}
    assert not changed
    assert sum("new" in str(row["key"]) for row in index_rows(tmp_path / "out")) == 1


def test_a_file_changed_later_is_counted_and_not_processed_twice(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(4))
    config = path_config(corpus, tmp_path / "out")
    preprocess(config, progress=False)
    write_corpus(corpus, {"speaker0/clip000.flac": 9.0})
    later = preprocess(config, progress=False)
    assert (later.changed_files, later.segments) == (1, 4)


def test_a_speaker_named_later_is_counted_and_the_shards_stay(tmp_path: Path) -> None:
    config = path_config(write_corpus(tmp_path / "corpus", many(4)), tmp_path / "out")
    assert preprocess(config, progress=False).relabelled == 0
    first = contents(tmp_path / "out")
    named = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, language="en"))
    later = preprocess(named, progress=False)
    assert (later.relabelled, later.units_done) == (4, 0)
    assert any(name == "relabelled since" and value.startswith("4 ") for name, value in later.rows())
    assert preprocess(config, progress=False).relabelled == 0
    assert {name for name in first if name.endswith(".tar")} <= contents(tmp_path / "out").keys()


def test_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(20))
    config = path_config(corpus, tmp_path / "out")
    preprocess(config, progress=False)
    first = contents(tmp_path / "out")
    tars = sorted((tmp_path / "out").glob("*.tar"))
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:1000])
    assert preprocess(config, progress=False).units_done == 2
    assert contents(tmp_path / "out") == first


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(2))
    preprocess(path_config(corpus, tmp_path / "out"), progress=False)
    other = path_config(corpus, tmp_path / "out", cut={"max_seconds": 5.0})
    with pytest.raises(ConfigError, match=r"cut.max_seconds=5.0 here, 30.0 there"):
        preprocess(other, progress=False)


def test_a_corpus_without_usable_audio_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").write_bytes(b"RIFF")
    summary = preprocess(path_config(tmp_path / "corpus", tmp_path / "out"), progress=False)
    assert summary.exit_code == 1
    assert "nothing could be used" in summary.problem
    with pytest.raises(ConfigError, match="no such folder"):
        preprocess(path_config(tmp_path / "none", tmp_path / "out"), progress=False)


def test_the_longest_units_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(5) | {"speaker9/day.wav": 70.0})
    given: list[PlannedUnit] = []

    def recorded(function: Any, arguments: Iterable[tuple[str, Any]], *rest: Any) -> dict[str, str]:
        tasks = list(arguments)
        given.extend(unit for _, (unit, _) in tasks)
        return run_tasks(function, tasks, *rest)

    monkeypatch.setattr(job, "run_tasks", recorded)
    preprocess(path_config(corpus, tmp_path / "out", shard_mb=0.1), progress=False)
    lengths = [unit.seconds for unit in given]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_the_forecast_writes_nothing(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(20))
    forecast = plan_units(path_config(corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    summary = preprocess(path_config(corpus, tmp_path / "out"), progress=False)
    assert forecast.units == summary.shards
    assert forecast.hours == pytest.approx(summary.hours_in, rel=0.9)
    assert plan_units(path_config(corpus, tmp_path / "out")).files == 0


def test_a_local_ray_listens_on_localhost_only() -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            listening |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
