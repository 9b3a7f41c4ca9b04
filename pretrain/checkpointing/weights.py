"""Reads the weights of a checkpoint for everything but a resume: export, init=, evaluate, finetune, targets, replay.

Checksums are compared before a tensor is used, and names and shapes must match the model. A resume does the same in
`checkpoint.load_latest`, with the engine's names.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.schema import load as load_config
from pretrain.checkpointing.locate import remedy
from pretrain.checkpointing.stored import read_state
from pretrain.config import Config
from pretrain.interfaces.configs import TuneConfig
from pretrain.nn.tuning import merge
from pretrain.train_module import TrainModule, build_model

MODEL = "model.safetensors"


class LoadedCheckpoint(NamedTuple):
    """A model with the weights of a checkpoint, the config that it was trained with, and the number of updates."""

    module: TrainModule
    config: Config
    step: int


def load_checkpoint(folder: Path) -> LoadedCheckpoint:
    """Builds the model of a checkpoint from the saved config and loads its weights.

    Args:
        folder: a checkpoint, such as RUN/checkpoints/step_00000100.

    Returns:
        The model on the CPU in training mode, its config and its number of updates.

    Raises:
        ValueError: the checkpoint is damaged, or its weights do not fit its config; the message names the file and the
            remedy.
        ConfigError: this version cannot read its config.
    """
    state = read_state(folder)
    config = load_config(Config, state["config"])
    weights = read_weights(folder)
    module = build_model(config)
    fill(module, weights, str(folder / MODEL))
    return LoadedCheckpoint(module, config, state["step"])


def merged(found: LoadedCheckpoint) -> LoadedCheckpoint:
    """Returns a loaded run whose LoRA is part of its matrices, with the same outputs; other runs as they are.

    The module of `found` is changed.
    """
    if found.config.tune.name != "lora":
        return found
    merge(found.module.model)
    return found._replace(config=dataclasses.replace(found.config, tune=TuneConfig()))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint: name in the TrainModule -> fp32 tensor.

    Those that a folder of tuned weights does not hold (pretrain.checkpointing.tuned) are its base's.

    Raises:
        ConfigError: the base of tuned weights is missing or another one.
        ValueError: the file is missing or cannot be read, or its checksum differs from that in state.json.
    """
    base = read_state(folder).get("base")
    own = _read_file(folder)
    if base is None:
        return own
    theirs = _read_base(folder, base)
    return {name: tensor for name, tensor in theirs.items() if name.startswith("model.")} | own


def _read_base(folder: Path, base: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads the weights of the base of tuned weights, after comparing checksums."""
    place, remedy = Path(base["checkpoint"]), f"write the base's place into {folder / 'state.json'} (base.checkpoint)"
    try:
        state = read_state(place)
    except ValueError as error:
        raise ConfigError(f"{folder}: its base cannot be read; {remedy}: {error}") from error
    found = state["sha256"][MODEL]
    if found != base["sha256"] or state.get("base"):
        raise ConfigError(
            f"{folder}: was tuned on a base with sha256 {base['sha256'][:12]}…, and {place} has {found[:12]}…; {remedy}"
        )
    return _read_file(place)


def _read_file(folder: Path) -> dict[str, Tensor]:
    file, expected = folder / MODEL, read_state(folder)["sha256"][MODEL]
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}); {remedy(folder.parent)}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{file}: checksum mismatch (sha256 is {found[:12]}…, state.json has {expected[:12]}…); "
            f"{remedy(folder.parent)}"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error}); {remedy(folder.parent)}") from error


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copies weights into a module; names and shapes must match exactly.

    Args:
        module: the module to fill.
        weights: name -> tensor.
        where: origin of the weights, for messages.

    Raises:
        ValueError: a weight is missing or unexpected, or a shape differs; the message has both shapes.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model expects {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise ValueError(f"{where}: does not fit the model of its config: {problems[0]}{more}")
    module.load_state_dict(dict(weights))
