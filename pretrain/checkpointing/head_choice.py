"""Chooses a head of a run by its kind, and the device, for whatever opens a run to use one of its heads."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from data_pipeline.core.schema import ConfigError, hint
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.config import Config
from pretrain.interfaces.objectives import Head
from pretrain.train_module import TrainModule

HeadType = TypeVar("HeadType", bound=Head)


def checkpoint_with_heads(given: str, remedy: str = "name a run") -> Path:
    """Returns the folder of a checkpoint of a run.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        remedy: what to do instead of giving a Hugging Face folder, for the message.

    Raises:
        ConfigError: there is no such checkpoint, or it is a Hugging Face folder, which has no head of ours.
    """
    folder = find_checkpoint(given)
    if not (folder / "state.json").is_file():
        raise ConfigError(f"checkpoint={given}: a Hugging Face folder without a head of ours; {remedy}")
    return folder


def chosen_head(
    given: str,
    module: TrainModule,
    config: Config,
    kind: type[HeadType],
    head: str,
    described: str,
    remedy: str,
    field: str = "head",
) -> tuple[str, HeadType]:
    """Returns the head of a kind, with its name.

    Args:
        given: the run, for messages.
        module, config: the loaded run.
        kind: class of the head.
        head: name of the head; empty: the only one of its kind.
        described: what such a head is, after "the run has no head", such as "that speaks".
        remedy: how to get one, for the message.
        field: the field that gave `head`.

    Raises:
        ConfigError: there is no such head, or several to choose from.
    """
    heads = {name: found for name, found in module.heads.items() if isinstance(found, kind)}
    has = ", ".join(f"{name} ({found.name})" for name, found in config.heads.items()) or "no heads"
    if not heads:
        raise ConfigError(f"checkpoint={given}: the run has no head {described}; it has {has}; {remedy}")
    if head not in heads and (head or len(heads) > 1):
        shown = head or "''"
        raise ConfigError(f"{field}={shown}: must be one of {', '.join(heads)}{hint(head, heads)}; the run has {has}")
    name = head or next(iter(heads))
    return name, heads[name]


def chosen_device(device: str) -> str:
    """Returns the torch device to use: "auto" is CUDA where there is a device, else the CPU.

    Raises:
        ConfigError: "cuda" without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device; leave it out")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
