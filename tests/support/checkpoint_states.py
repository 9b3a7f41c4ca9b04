"""Writes checkpoints without training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.core.schema import dump
from pretrain.config import Config
from pretrain.train_module import TrainModule

FILES = ("model.safetensors", "optimizer.safetensors")


def state(step: int = 0, **fields: Any) -> dict[str, Any]:
    """Returns the content of a state.json of format 1."""
    values: dict[str, Any] = {"format": 1, "step": step, "cursor": None, "health": {}, "config": {}, "loss_scale": {}}
    return values | {"sha256": dict.fromkeys(FILES, "0" * 64)} | fields


def write_state(run: Path, step: int, **fields: Any) -> Path:
    """Writes a checkpoint of that step without tensors, as the newest of the run; returns its folder."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state(step, **fields)))
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")
    return folder


def write_run(run: Path, config: Config, module: TrainModule, step: int = 1, **fields: Any) -> Path:
    """Writes a run folder with a checkpoint of `module`, without optimizer states; returns the checkpoint.

    `fields` are further ones of its state.json."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / FILES[0])
    save_file({}, folder / FILES[1])
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    (run / "config.json").write_text(json.dumps(dump(config)))
    return write_state(run, step, config=dump(config), sha256=sums, **fields)
