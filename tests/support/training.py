"""Tiny training runs on synthetic speech, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.schema import load
from data_pipeline.loader.held_out import HeldOut
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.checkpoint import TrainState
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.train import Ending, train
from pretrain.train_module import build_model
from tests.support.synthetic_reader import SyntheticReader

STREAMING_RECOGNISER: dict[str, Any] = {
    "frontend": {"name": "log_mel", "normalize": "fixed"},
    "encoder": {
        "name": "transformer",
        "layers": 2,
        "dim": 32,
        "heads": 2,
        "ffn_dim": 64,
        "norm": "pre",
        "positions": "rope",
        "attention": "chunked",
        "chunk_frames": [4, 8],
        "left_chunks": [2, -1],
    },
    "heads": {"text": {"name": "ctc", "symbols": " ab"}},
}
"""Fields of a run that recognises streams; its untrained text is as fixed as that of a good one."""


def config(steps: int = 6, **top: Any) -> Config:
    return load(
        Config,
        {
            "data": {"shards": "synthetic", "micro_batches": 4},
            "frontend": {"name": "log_mel"},
            "encoder": {"name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64},
            "objective": {"name": "best_rq", "n_codes": 32},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 2},
            "train": {"steps": steps, "checkpoint_every": 2, "keep_last": 2, "media_every": 0},
            "engine": {"name": "torch"},
            **top,
        },
    )


def run(
    folder: Path,
    settings: Config,
    stop_after: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    held_out: HeldOut | None = None,
) -> tuple[Ending, Engine]:
    """Starts a run once, as launch.workers.rank does."""
    torch.set_num_threads(1)
    run_folder = RunFolder(folder)
    run_folder.claim()
    engine = make_engine(settings, build_model(settings), DistributedContext())
    polls = iter(range(10**6))
    ending = train(
        settings,
        engine,
        SyntheticReader(),
        run_folder,
        Heartbeat(folder, 0, 600),
        lambda: stop_after is not None and next(polls) + 1 >= stop_after,
        say=say,
        held_out=held_out,
    )
    return ending, engine


def save(path: Path, *steps: int, seed: int = 0, **top: Any) -> None:
    """Saves checkpoints of an untrained model; `top` are sections of its config."""
    folder = RunFolder(path)
    folder.claim()
    settings = replace(config(4, **top), seed=seed)
    settings = replace(settings, train=replace(settings.train, keep_last=10))
    engine = make_engine(settings, build_model(settings), DistributedContext())
    with checkpoint.Saver(folder, engine, settings) as saver:
        for step in steps:
            saver.save(TrainState(step))
