"""Prepares runs for tests that kill ranks, starts their ranks and kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import dump, load
from pretrain.config import Config

STEPS = 12


def prepare(runs: Path, name: str, shards: Path, more: Mapping[str, Any] | None = None) -> Path:
    """Writes a run folder as `auricle pretrain` prepares it for its ranks.

    Args:
        runs: folder of runs.
        name: the run's.
        shards: folder of shards.
        more: fields that differ, by section; a part with another name has these alone.
    """
    values: dict[str, Any] = {
        "name": name,
        "runs": str(runs),
        "data": {
            "shards": str(shards),
            "batch_seconds": 8.0,
            "micro_batches": 2,
            "min_seconds": 0.5,
            "max_seconds": 2.0,
            "workers": 1,
        },
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer", "layers": 2, "dim": 64, "heads": 2, "ffn_dim": 128},
        "objective": {"name": "best_rq", "n_codes": 64},
        "schedule": {"warmup_steps": 4},
        "train": {"steps": STEPS, "checkpoint_every": 3},
        "engine": {"name": "torch"},
    }
    for section, fields in (more or {}).items():
        before = values.get(section, {})
        values[section] = {**({} if "name" in fields and fields["name"] != before.get("name") else before), **fields}
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dump(load(Config, values))))
    return folder


def start(folder: Path, **more: str) -> subprocess.Popen[bytes]:
    """Starts a rank of a run.

    Args:
        folder: the run's.
        **more: variables of its environment.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-m", "launch.workers.rank", str(folder)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after(folder: Path, process: subprocess.Popen[bytes], step: int, extra: float) -> None:
    """Sends SIGKILL `extra` seconds after the row of `step` was written."""
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_rows(folder / "metrics.jsonl")):
        assert process.poll() is None, (process.stderr.read() if process.stderr else b"").decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    process.wait()
