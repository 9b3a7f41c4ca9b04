"""Writes the first checkpoint of a run whose weights come from elsewhere, so that it is a run like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from pretrain.checkpointing.checkpoint import TrainState, write_checkpoint
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.optimizer import MOMENTS
from pretrain.train_module import TrainModule


def write_initial(
    folder: Path, module: TrainModule, config: Config, tokens: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes the checkpoint of step 0: the module's weights, and zeros as the optimizer's moments.

    Args:
        folder: the run folder; created if it does not exist.
        module: model, objective and heads.
        config: the config of the run.
        tokens: sha256 of the tokens that its heads were trained with, by their name in data.tokens.

    Raises:
        OSError: the folder cannot be written.
    """
    run = RunFolder(folder)
    run.claim()
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    moments = {f"{moment}/{name}": torch.zeros_like(weight.data) for moment in MOMENTS for name, weight in trained}
    files = {"model": weights, "optimizer": moments}
    write_checkpoint(
        run, run.checkpoints / f"step_{0:08d}", files, state=TrainState(), config=config, extra={"tokens": dict(tokens)}
    )
