"""A NaN sample stops a run, and `auricle replay` finds it, both by command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards

TINY = [
    "frontend=log_mel", "encoder=transformer", "encoder.layers=1", "encoder.dim=32", "encoder.heads=2",
    "encoder.ffn_dim=64", "objective=best_rq", "objective.n_codes=16", "engine.name=torch", "schedule.warmup_steps=2",
    "data.batch_seconds=6", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2", "data.workers=0",
    "train.steps=60", "train.checkpoint_every=3", "health.on_collapse=warn", "launcher.processes=1",
]  # fmt: skip


def auricle(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    command = [sys.executable, "-m", "launch.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=home, env=environment)


@pytest.mark.slow
def test_a_planted_nan_stops_the_run_and_replay_names_it(tmp_path: Path) -> None:
    everything = sounds([1.0 + 0.02 * i for i in range(40)])
    everything[23] = replace(everything[23], broken=True)
    write_shards(tmp_path / "shards", [everything[:20], everything[20:]], codec="wav")

    trained = auricle(tmp_path, "pretrain", f"data.shards={tmp_path / 'shards'}", f"runs={tmp_path}", "name=bad", *TINY)
    assert trained.returncode == 3, trained.stdout + trained.stderr
    assert "auricle replay" in trained.stderr
    assert (tmp_path / "bad" / "UNHEALTHY").exists()
    (event,) = [json.loads(line) for line in (tmp_path / "bad" / "health.jsonl").read_text().splitlines()]
    assert event["detector"] == "not finite"

    again = auricle(tmp_path, "replay", str(tmp_path / "bad"))
    assert again.returncode == 0, again.stderr
    assert f"the loss of step {event['step']} is nan; 2 micro-batches" in again.stdout
    rows = [line for line in again.stdout.splitlines() if "a-00" in line]
    assert len(rows) == 2
    (broken,) = [row for row in rows if "nan" in row]
    assert "the audio itself" in broken
    kept = json.loads((tmp_path / "bad" / "health" / f"step_{event['step']:08d}" / "rank_0.json").read_text())
    (keys,) = [batch["keys"] for batch in kept["batches"] if everything[23].key in batch["keys"]]
    assert keys[0] in broken
