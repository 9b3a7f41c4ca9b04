"""Starts runs that record the keys of their samples."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import dump, load
from pretrain.config import Config


def prepare(runs: Path, name: str, shards: Path, engine: dict[str, Any], steps: int) -> Path:
    """Writes a run folder as `auricle pretrain` prepares it for its ranks."""
    folder = runs / name
    values: dict[str, Any] = {
        "name": name,
        "runs": str(runs),
        "data": {
            "shards": str(shards), "batch_seconds": 8.0, "micro_batches": 2, "min_seconds": 0.5, "max_seconds": 2.0,
            "workers": 1, "keys_log": str(folder / "keys"),
        },
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer", "layers": 1, "dim": 32, "heads": 2, "ffn_dim": 64},
        "objective": {"name": "best_rq", "n_codes": 64},
        "schedule": {"warmup_steps": 4},
        "train": {"steps": steps, "checkpoint_every": 2},
        "engine": engine,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dump(load(Config, values))))
    return folder


def start(folder: Path, world: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = os.environ | {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launch.workers.rank", str(folder)]
        processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    return processes
