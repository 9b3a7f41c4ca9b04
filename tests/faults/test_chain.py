"""SIGKILL in every job of a HuBERT chain: repeating the command gives the bit-identical undisturbed result."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from data_pipeline.core.jsonl import read_rows
from tests.support.faults.kills import ROOT, Job
from tests.support.tiny_shards import sounds, write_shards

pytestmark = pytest.mark.slow
STEPS = 6
TOY = (
    "objective=hubert", "objective.mask_span=3", "objective.projection_dim=16", "frontend=log_mel",
    "frontend.subsampling=2", "encoder=transformer_tiny", "encoder.dim=32", "encoder.heads=2", "encoder.layers=2",
    "encoder.ffn_dim=64", "data.batch_seconds=8", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2",
    "data.workers=1", "schedule.warmup_steps=3", "train.checkpoint_every=2", "train.media_every=0",
    "train.save_behind=false", "engine.name=torch", "health.on_collapse=warn", "name=toy",
    f"chain.it1.steps={STEPS}", "chain.it1.classes=8", "chain.it1.fraction=1",
    f"chain.it2.steps={STEPS}", "chain.it2.classes=12", "chain.it2.layer=1", "chain.it2.fraction=1",
)  # fmt: skip


def start(shards: Path, runs: Path) -> Job:
    command = [sys.executable, "-m", "launch.main", "pretrain", *TOY, f"data.shards={shards}", f"runs={runs}"]
    runs.mkdir(exist_ok=True)
    output = (runs / "output.txt").open("a")
    return Job(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True))


def kill_when(shards: Path, runs: Path, due: Callable[[], bool]) -> None:
    """Kills the command and all its processes as soon as `due()` is true."""
    job, deadline = start(shards, runs), time.monotonic() + 600
    try:
        while not due():
            assert job.process.poll() is None, (runs / "output.txt").read_text()[-2000:]
            assert time.monotonic() < deadline
            job.look()
            time.sleep(0.05)
        job.process.kill()
    finally:
        job.clean_up()


def finish(shards: Path, runs: Path) -> None:
    job = start(shards, runs)
    try:
        assert job.process.wait(timeout=900) == 0, (runs / "output.txt").read_text()[-2000:]
    finally:
        job.clean_up()


def made(runs: Path) -> dict[str, bytes]:
    """Returns the results of a chain: centres, labels and models of both iterations."""
    found = {}
    for file in sorted([*runs.glob("toy-it?-labels/labels/*.parquet"), *runs.glob("toy-it?-labels/labels/kmeans.*")]):
        if file.suffix == ".parquet":
            content = repr(pq.read_table(file).to_pylist()).encode()
        else:
            content = load_file(file)["centres"].tobytes()
        found[str(file.relative_to(runs))] = content
    for file in runs.glob(f"toy-it?/checkpoints/step_{STEPS:08d}/model.safetensors"):
        found[str(file.relative_to(runs))] = file.read_bytes()
    return found


@pytest.mark.timeout(3600)
def test_a_chain_killed_in_every_link_gives_the_same_result(tmp_path: Path) -> None:
    rng = random.Random(0)
    shards = write_shards(
        tmp_path / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(10)], corpus=name) for name in "ab"]
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(shards, whole)

    def steps(name: str) -> int:
        return max((row["step"] for row in read_rows(killed / name / "metrics.jsonl")), default=0)

    kill_when(shards, killed, lambda: any((killed / "toy-it1-labels/labels/_fit").glob("0002*")))
    assert not list(killed.glob("toy-it1-labels/labels/*.parquet"))
    kill_when(shards, killed, lambda: steps("toy-it1") >= 3)
    first = {file: file.stat().st_mtime_ns for file in killed.glob("toy-it1-labels/labels/*.parquet")}
    kill_when(shards, killed, lambda: any((killed / "toy-it2-labels/labels/_fit").glob("0001*")))
    model = killed / f"toy-it1/checkpoints/step_{STEPS:08d}/model.safetensors"
    first[model] = model.stat().st_mtime_ns
    kill_when(shards, killed, lambda: steps("toy-it2") >= 3)
    finish(shards, killed)

    assert {file: file.stat().st_mtime_ns for file in first} == first, "a finished link was repeated"
    for name in ("toy-it1", "toy-it2"):
        assert [row["step"] for row in read_rows(killed / name / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert len(made(whole)) == 2 * (2 + 1 + 1)
    assert made(killed) == made(whole)
    said = (killed / "output.txt").read_text()
    assert "it1-labels: " in said
    assert "is complete" in said
