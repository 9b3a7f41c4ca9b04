"""A Ray cluster loses a node during training and preprocessing; results equal those of undisturbed jobs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import load
from data_pipeline.preprocess.config import PreprocessConfig
from pretrain.checkpointing.locate import steps_done
from tests.support.corpora import preprocess_here
from tests.support.faults.keys import handed_over
from tests.support.faults.mini_slurm import wait_for
from tests.support.paths import ROOT
from tests.support.sounds import many, write_corpus
from tests.support.tiny_shards import sounds, write_shards

STEPS = 30
TINY = (
    *("objective=best_rq", "frontend=log_mel", "encoder=transformer_tiny", "engine.name=torch"),
    *("objective.n_codes=64", "encoder.dim=64", "encoder.layers=2", "encoder.ffn_dim=128", "encoder.heads=2"),
    *("data.batch_seconds=8", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2", "data.workers=1"),
    *(f"train.steps={STEPS}", "train.checkpoint_every=5", "schedule.warmup_steps=4", "engine.timeout_minutes=1"),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Starts a cluster of one single-core node, to which tests add nodes; dead nodes are detected within seconds."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def pretrain(base: Path, name: str, *launcher: str) -> subprocess.Popen[bytes]:
    paths = (f"name={name}", f"runs={base}", f"data.shards={base / 'shards'}", f"data.keys_log={base / name / 'keys'}")
    return subprocess.Popen([sys.executable, "-m", "launch.main", "pretrain", *TINY, *paths, *launcher], cwd=ROOT)


def power_off(cluster: Any, node: Any) -> None:
    """Kills all processes of the node at once: raylet, workers and their ranks."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [*raylet.children(recursive=True), raylet]:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def said(folder: Path) -> str:
    logs = sorted((folder / "logs").glob("*.log"))
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_continues_on_fewer_ranks_after_a_lost_node_with_the_same_losses(
    tmp_path: Path, cluster: Any, engine: str
) -> None:
    rng = random.Random(0)
    write_shards(tmp_path / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(60)])])
    node = cluster.add_node(num_cpus=1)
    engine = f"engine.name={engine}"
    hurt = pretrain(tmp_path, "hurt", engine, "launcher=ray", f"launcher.address={cluster.address}")
    here = ("launcher.processes=1", "launcher.threads=1")  # the number of threads that Ray gives a rank
    calm = pretrain(tmp_path, "calm", engine, *here)
    folder = tmp_path / "hurt"
    wait_for(lambda: steps_done(folder) >= 10, 240, "a checkpoint", lambda: said(folder))
    power_off(cluster, node)
    assert hurt.wait(timeout=240) == 0, said(folder)
    driver = (folder / "logs" / "launcher.log").read_text()
    assert "2 ranks, from step 0" in driver
    assert "1 ranks, from step" in driver
    assert calm.wait(timeout=240) == 0, said(tmp_path / "calm")
    ours, theirs = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("hurt", "calm"))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert handed_over(folder) == handed_over(tmp_path / "calm")
    assert len(handed_over(folder)) == 2 * STEPS, "two micro-batches per step"
    differences = [abs(mine["loss/total"] - other["loss/total"]) for mine, other in zip(ours, theirs, strict=True)]
    print("largest difference of a loss:", max(differences))
    assert max(differences) <= 1e-6, "the sum of two micro-batches does not depend on the number of ranks"


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_node_lost_during_preprocessing_does_not_change_the_shards(tmp_path: Path, cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    corpus = ("corpus=path", f"corpus.path={write_corpus(tmp_path / 'corpus', many(90, 8.0))}", "codec=opus")
    plain = (*corpus, "shard_mb=0.05", "report=false", f"runs={tmp_path / 'runs'}")
    command = ["preprocess", *plain, f"out={tmp_path / 'hurt'}", "launcher=ray", f"launcher.address={cluster.address}"]
    hurt = subprocess.Popen([sys.executable, "-m", "launch.main", *command], cwd=ROOT)
    done = tmp_path / "hurt" / "_done"
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    wait_for(lambda: done.exists() and any(works(child) for child in raylet.children(recursive=True)), 120, "a worker")
    power_off(cluster, node)
    finished = len(list(done.iterdir()))
    assert hurt.wait(timeout=240) == 0
    calm = load(PreprocessConfig, {**job_values(tmp_path / "runs" / "preprocess_hurt"), "out": str(tmp_path / "calm")})
    preprocess_here(calm)
    tars = [{tar.name: tar.read_bytes() for tar in (tmp_path / name).glob("*.tar")} for name in ("hurt", "calm")]
    assert tars[0] == tars[1]
    assert finished < len(tars[0]), "the node was lost during the job"


def works(process: psutil.Process) -> bool:
    """Returns whether the process is a worker that processes a work unit."""
    try:
        return "process_planned" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def job_values(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "task.json").read_text())["config"]
    return values
