"""Where a job runs: the `launcher` part of a job's config."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from data_pipeline.schema import PluginChoice, about, config
from pretrain.config import Config


@config
class LocalConfig:
    """This machine, through the `deepspeed` launcher."""

    name: Annotated[Literal["local"], about("this machine")] = "local"
    processes: Annotated[int, about("ranks to start; 0 takes one per GPU, or one where there is none", ge=0)] = 0
    threads: Annotated[int, about("CPU threads per rank; 0 shares the cores among the ranks", ge=0)] = 0


LAUNCHERS: dict[str, type[Any]] = {"local": LocalConfig}


def _launcher_names() -> list[str]:
    return sorted(LAUNCHERS)


def _launcher_type(name: str) -> type[Any]:
    if name not in LAUNCHERS:
        raise ValueError(f"there is no launcher {name!r}; there are: {', '.join(sorted(LAUNCHERS))}")
    return LAUNCHERS[name]


@config
class PretrainJob(Config):
    """A pretraining run and where it runs: the root of conf/pretrain.yaml."""

    launcher: Annotated[Any, PluginChoice("launcher", _launcher_names, _launcher_type)] = dataclasses.field(
        default_factory=LocalConfig
    )
