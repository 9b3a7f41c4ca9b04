"""Writes state.json files without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("model.safetensors", "optimizer.safetensors")


def state(step: int = 0, **fields: Any) -> dict[str, Any]:
    """The content of a state.json of format 1."""
    values: dict[str, Any] = {"format": 1, "step": step, "cursor": None, "health": {}, "config": {}, "loss_scale": {}}
    return values | {"sha256": dict.fromkeys(FILES, "0" * 64)} | fields


def write_state(run: Path, step: int, **fields: Any) -> Path:
    """A checkpoint of that step without tensors, as the newest one of the run; returns its folder."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state(step, **fields)))
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")
    return folder
