"""Refuses objectives and heads that need frames of all devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.objectives import Head, Objective
from pretrain.self_supervision.deferred_fit import FittedOnce
from pretrain.train_module import TrainModule


def require_private(module: TrainModule) -> None:
    """Refuses modules that learn from frames of all ranks: these would leave the devices.

    Raises:
        ConfigError: the objective or a head fits something to frames that it gathers.
    """
    unfitted = [name for name, part in module.named_modules() if isinstance(part, FittedOnce) and not part.fitted]
    if unfitted:
        raise ConfigError(
            f"engine.name=federated: {unfitted[0]} is fitted to frames of the first update, which must not leave the "
            "devices; start from a run in which it is fitted (init=RUN), or choose targets that need no fit, such as "
            "objective=best_rq with refine=false projection=random"
        )
    parts: Mapping[str, torch.nn.Module] = {"objective": module.objective, **dict(module.heads.items())}
    for name, part in parts.items():
        if isinstance(part, Objective | Head) and part.gathers:
            raise ConfigError(
                f"engine.name=federated: {name} ({type(part).__name__}) updates its state from frames or vectors of "
                "all ranks, which must not leave the devices; choose another objective or head"
            )
