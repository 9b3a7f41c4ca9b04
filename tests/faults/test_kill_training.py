"""SIGKILL during training: repeating the command gives a result bit-identical to an undisturbed run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from tests.support.faults.kill_runs import STEPS, kill_after, prepare, start
from tests.support.faults.site import learned
from tests.support.tiny_shards import sounds, write_shards


def test_a_killed_run_started_again_is_bit_identical_to_an_undisturbed_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    shards = write_shards(tmp_path / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(40)])])
    whole = prepare(tmp_path, "whole", shards)
    undisturbed = start(whole)
    killed = prepare(tmp_path, "killed", shards)
    for step in (2, 7):
        kill_after(killed, start(killed), step, rng.uniform(0, 0.2))
    last = start(killed)
    assert last.wait(timeout=120) == 0
    assert undisturbed.wait(timeout=120) == 0

    assert learned(killed) == learned(whole)
    assert [step for step, _, _ in learned(killed)] == list(range(1, STEPS + 1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        end = Path("checkpoints") / f"step_{STEPS:08d}" / name
        assert (killed / end).read_bytes() == (whole / end).read_bytes()
    assert len(list((killed / "incarnations").iterdir())) == 3


def test_a_rank_reports_a_config_error_without_a_traceback(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "run", tmp_path / "nothing")
    process = start(folder)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in said.decode()
    assert "nothing" in said.decode()


def test_a_stop_request_during_start_up_is_kept(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [sounds([1.5] * 20)])
    folder = prepare(tmp_path, "run", shards)
    (folder / "STOP").touch()  # as by Ctrl-C before any rank has started
    process = start(folder)
    assert process.wait(timeout=120) == 85
    assert 0 < read_rows(folder / "metrics.jsonl")[-1]["step"] < STEPS
    assert (folder / "checkpoints" / "latest").is_file()


@pytest.mark.slow
def test_a_resume_does_not_need_the_initial_weights(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [sounds([1.5] * 20)])
    source, folder = prepare(tmp_path, "source", shards), prepare(tmp_path, "run", shards)
    (source / "STOP").touch()
    assert start(source).wait(timeout=120) == 85
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"init": str(source)}))
    (folder / "STOP").touch()
    assert start(folder).wait(timeout=120) == 85
    (folder / "STOP").unlink()
    source.rename(tmp_path / "gone")
    assert start(folder).wait(timeout=120) == 0
