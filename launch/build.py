"""The composition root: a config becomes the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.stream import open_reader
from data_pipeline.types import StepReader
from pretrain.config import Config
from pretrain.engines import Engine, World, make_engine
from pretrain.export.initial import load_initial
from pretrain.model import build_model
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """What `pretrain.train.train` needs."""

    engine: Engine
    reader: StepReader


def build(config: Config, world: World, folder: RunFolder) -> Run:
    """Builds everything for one rank of the run in `folder`.

    Raises ValueError or ConfigError for a config that cannot work here.
    """
    reader = open_reader(config.data, config.seed, world.rank, world.size)
    module = build_model(config)
    if config.init and not (folder.checkpoints / "latest").is_file():  # a resume brings its own weights
        load_initial(config, module)
    engine = make_engine(config, module, world)
    return Run(engine, reader)
