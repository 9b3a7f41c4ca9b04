"""Loads the teacher of a distillation from its run."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.checkpointing.weights import MODEL, load_checkpoint
from pretrain.config import Config
from pretrain.interfaces.objectives import Objective


def load_teacher(config: Config, objective: Objective) -> None:
    """Gives the objective the model of the run that its config names; does nothing where none is named.

    Args:
        config: the config of the run.
        objective: its objective, which keeps the teacher without making it part of its state.

    Raises:
        ConfigError: there is no such run, or its model does not fit the student's.
        ValueError: the checkpoint is damaged.
    """
    given = config.objective.teacher_run
    if not given:
        return
    folder = find_checkpoint(given)
    if not (folder / "state.json").is_file():
        raise ConfigError(f"objective.teacher={given}: only runs of auricle teach; start one with init={given}")
    objective.take_teacher(load_checkpoint(folder).module.model, read_state(folder)["sha256"][MODEL])
