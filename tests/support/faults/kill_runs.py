"""Prepares runs for tests that kill ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import dump, load
from pretrain.config import Config

STEPS = 12


def prepare(runs: Path, name: str, shards: Path) -> Path:
    """Writes a run folder as `auricle pretrain` prepares it for its ranks."""
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
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dump(load(Config, values))))
    return folder
