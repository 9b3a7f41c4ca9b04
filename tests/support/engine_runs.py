"""Runs engine cases on several ranks and compares their results."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 5


CONFIG: dict[str, Any] = {
    "data": {"shards": "synthetic", "micro_batches": 4},
    "frontend": {"name": "log_mel"},
    "encoder": {"name": "transformer", "layers": 2, "dim": 64, "heads": 2, "ffn_dim": 128, "dropout": 0.1},
    "objective": {"name": "best_rq", "n_codes": 64},
    "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
    "schedule": {"warmup_steps": 2},
    "train": {"steps": STEPS},
    "engine": {"name": "torch"},
}


def case(engine: str, stage: int = 1, settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["engine"] = {"name": engine, "zero_stage": stage, **(settings or {})}
    return {"config": config, "steps": STEPS, **more}


def run(tmp: Path, name: str, ranks: int, cases: dict[str, Any]) -> dict[str, Any]:
    """Starts `ranks` processes over gloo and returns what rank 0 measured."""
    (tmp / f"{name}.json").write_text(json.dumps(cases))
    out = tmp / f"{name}.out.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    base |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tests.support.engine_cases", str(tmp / f"{name}.json"), str(out)]
    logs = [tmp / f"{name}.{rank}.log" for rank in range(ranks)]  # a pipe that is not read would stop a rank
    started = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
    try:
        for process in started:
            process.wait(timeout=540)
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    ends = [
        f"rank {rank}: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}" for rank, log in enumerate(logs)
    ]
    assert not any(codes), "\n".join([*ends, f"exit codes by rank: {codes}"])
    return dict(json.loads(out.read_text()))


def furthest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))
