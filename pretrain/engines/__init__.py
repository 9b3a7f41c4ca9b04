"""Engines: how one optimizer step runs, with DeepSpeed or in plain torch."""

from __future__ import annotations

from data_pipeline.sampling.plan import accumulation
from pretrain.config import Config
from pretrain.engines.base import Engine, StepResult
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.meta import MetaEngine
from pretrain.engines.plain_torch import TorchEngine
from pretrain.train_module import TrainModule

__all__ = ["DistributedContext", "Engine", "StepResult", "make_engine"]


def make_engine(config: Config, module: TrainModule, world: DistributedContext) -> Engine:
    """Returns the engine that `engine.name` selects.

    Args:
        config: the run's config.
        module: model and objective; moved to the rank's device.
        world: this rank and the number of ranks, at most `data.micro_batches` (checked by the reader).

    Returns:
        An engine with fresh optimizer state.

    Raises:
        ConfigError: engine.offload=nvme is not supported on this machine, or engine.fake_int8 lacks torchao.
    """
    module.anticipate_int8(config.engine.fake_int8, config.train.steps)
    if config.engine.name == "torch":
        return TorchEngine(module, config.engine, config.optimizer, world)
    if config.engine.name == "meta":
        return MetaEngine(module, config, world)
    from pretrain.engines.deepspeed import DeepSpeedEngine  # heavy, and absent on bare machines

    return DeepSpeedEngine(
        module, config.engine, config.optimizer, world, accumulation(config.data.micro_batches, world.size)
    )
