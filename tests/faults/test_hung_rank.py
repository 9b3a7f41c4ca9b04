"""When one of two ranks hangs, the other one exits in time and names it; the log of the hung rank has its stacks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.core.loopback import free_port
from tests.support.faults.kill_runs import prepare
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards

TIMEOUT_MINUTES = 0.2


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_hung_rank_is_named_and_dumps_its_stacks(tmp_path: Path, engine: str) -> None:
    rng = random.Random(0)
    shards = write_shards(tmp_path / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(40)])])
    folder = prepare(tmp_path, "run", shards)
    config = json.loads((folder / "config.json").read_text())
    config["engine"] |= {"name": engine, "timeout_minutes": TIMEOUT_MINUTES}
    (folder / "config.json").write_text(json.dumps(config))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"AURICLE_RANK_LOGS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    modules = ("launch.workers.rank", "tests.support.faults.hung_rank")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, module in enumerate(modules)
    ]
    try:
        assert ranks[0].wait(timeout=90) == 1
        hung = (folder / "logs" / "rank_1.log").read_text()
        assert "a_kernel_that_never_ends" in hung, "the stacks must be in the log when the other rank exits"
        assert ranks[1].poll() is None, (
            "the other rank waited for the hung one to exit: " + (folder / "logs" / "rank_0.log").read_text()
        )
    finally:
        for rank in ranks:
            rank.kill()
    said = (folder / "logs" / "rank_0.log").read_text()
    assert "the slowest of 2 ranks is rank 1: computing (forward pass) at step 3" in said.splitlines()[-1], said
    note = json.loads((folder / "heartbeats" / "rank_1.start_1.json").read_text())
    waited = (folder / "logs" / "rank_0.log").stat().st_mtime - note["since"]
    assert 0.7 * 60 * TIMEOUT_MINUTES < waited < 60 * TIMEOUT_MINUTES + 15, (
        "the wait must follow the configured timeout"
    )
    assert time.time() - note["since"] < 90
