"""What the ranks of a run end with when a newer start of it took over: nothing written, a code that ends retries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core.schema import dump
from launch.workers.environment import free_port
from launch.workers.rank import STALE, UNHEALTHY
from tests.support.paths import ROOT
from tests.support.training import config

RANK = """
import os, sys, types
from pathlib import Path
from torch import distributed as dist
import launch.workers.build, pretrain.train
from launch.workers import rank
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.monitoring.health_monitor import UnhealthyError

def build(config, world, folder):
    reader = types.SimpleNamespace(close=lambda: None)
    return types.SimpleNamespace(engine=None, reader=reader)

def train(config, engine, reader, folder, *rest):
    if sys.argv[2] == "superseded" and os.environ["RANK"] == "0":
        RunFolder(folder.path).claim()
    dist.barrier()
    raise UnhealthyError("it does not learn")

launch.workers.build.build, pretrain.train.train = build, train
code = rank.main(sys.argv[1])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize(("case", "code"), [("superseded", STALE), ("alone", UNHEALTHY)])
def test_a_superseded_rank_says_so_and_leaves_no_mark(tmp_path: Path, case: str, code: int) -> None:
    """Rank 1, too, which claims no number itself."""
    (tmp_path / "config.json").write_text(json.dumps(dump(config())))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), case],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], said
    assert (tmp_path / "UNHEALTHY").exists() == (code == UNHEALTHY)
