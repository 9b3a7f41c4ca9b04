"""Writes the weights that a tuned run has beyond its base, alone: a folder of megabytes beside a base of gigabytes.

    FOLDER/model.safetensors   weights that learned: prompts, LoRA, adapters or biases, and the heads
           state.json          as of a checkpoint, with `base`: the base's checkpoint and the sha256 of its weights

Such a folder is opened wherever a checkpoint is (`weights.load_checkpoint`), with the weights of its base.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.core.atomic_files import sha256_of, write_json
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError, dump
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import FORMAT, read_state
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.checkpointing.token_sets import saved_tokens
from pretrain.checkpointing.weights import MODEL, load_checkpoint, read_weights


def write_tuned(checkpoint: Path, folder: Path) -> int:
    """Writes the tuned weights of a run to a folder of their own.

    Args:
        checkpoint: of the tuned run; its config names the base in `init`.
        folder: must not exist.

    Returns:
        The size of the weights in bytes.

    Raises:
        ConfigError: the run is not tuned or not from a run, its base is gone or another one, or `folder` exists.
        ValueError: a checkpoint is damaged.
    """
    module, config, step = load_checkpoint(checkpoint)
    if config.tune.name == "full":
        raise ConfigError(f"{checkpoint}: tune.name=full: all of its weights learned, so that it needs no base")
    if not config.init:
        raise ConfigError(f"{checkpoint}: init is empty: the run has no base that its tuned weights belong to")
    base = find_checkpoint(config.init)
    if not (base / "state.json").is_file():
        raise ConfigError(f"{base}: a Hugging Face folder, which holds no sha256; the run itself has all weights")
    state = read_state(base)
    if state.get("base"):
        raise ConfigError(f"{base}: holds tuned weights itself; the run itself has all weights")
    theirs, frozen = read_weights(base), {n for n, p in module.model.named_parameters() if not p.requires_grad}
    weights = module.state_dict()
    changed = [n for n in (f"model.{n}" for n in frozen) if n not in theirs or not torch.equal(weights[n], theirs[n])]
    if changed:
        raise ConfigError(f"{base}: is not the base of {checkpoint}: {changed[0]} differs; the run has all weights")
    kept = {n: w.contiguous().clone() for n, w in weights.items() if n.removeprefix("model.") not in frozen}
    with new_folder(folder, "for the tuned weights") as made:
        save_tensors(kept, made / MODEL)
        values = {"format": FORMAT, "step": step, "cursor": None, "config": dump(config)}
        values |= {"sha256": {MODEL: sha256_of(made / MODEL)}, "tokens": dict(saved_tokens(checkpoint))}
        values |= {"base": {"checkpoint": str(base.absolute()), "sha256": state["sha256"][MODEL]}}
        write_json(made / "state.json", values)
    return (folder / MODEL).stat().st_size
