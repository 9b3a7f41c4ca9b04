"""Plants failures into tiny training runs, for the tests and for benchmarks/prove/detectors.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch, StepReader
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine, StepResult
from pretrain.engines.distributed import DistributedContext
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.train import train
from pretrain.train_module import build_model
from tests.support.synthetic_reader import SyntheticReader

PLANTED = 22
"""The update before which the tests plant a failure."""
BEST_RQ: dict[str, Any] = {"name": "best_rq", "n_codes": 32}
WAV2VEC2: dict[str, Any] = {"name": "wav2vec2", "n_codes": 16, "code_dim": 16, "projection_dim": 16, "negatives": 20}
DATA2VEC: dict[str, Any] = {"name": "data2vec"}
TIME_CONTRASTIVE: dict[str, Any] = {
    "name": "time_contrastive", "clusters": 16, "projection_dim": 16, "negatives": 20,
}  # fmt: skip
DINOSR: dict[str, Any] = {"name": "dinosr", "top_layers": 2, "n_codes": 32}
RELABELLED: dict[str, Any] = {
    "name": "efficient", "units": 32, "predict_layers": [1, 2], "relabel_step": 14, "relabel_layer": 1,
    "relabel_units": 16,
}  # fmt: skip
"""Relabels at update 15, with another number of codes."""
Plant = Callable[[Engine], None]


def config(steps: int = 60, objective: dict[str, Any] | None = None, **top: Any) -> Config:
    """Returns the config of a tiny run with frequent health checks."""
    health = {"every": 2, "confirm": 3, "window": 10, "grace_steps": 20} | top.pop("health", {})
    return load(
        Config,
        {
            "data": {"shards": "synthetic", "micro_batches": 4, "batch_seconds": 6.94},
            "frontend": {"name": "log_mel"},
            "encoder": {"name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64, "norm": "pre"},
            "objective": objective or BEST_RQ,
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 2, "name": "constant"},
            "train": {"steps": steps, "checkpoint_every": 10, "keep_last": 20, "media_every": 0},
            "engine": {"name": "torch"},
            "health": health,
            **top,
        },
    )


def run(
    folder: Path,
    settings: Config,
    plant: Plant | None = None,
    once: bool = True,
    scaled: tuple[int, ...] = (),
    reader: Callable[[], StepReader] = SyntheticReader,
    planted: int = PLANTED,
) -> Engine:
    """Starts a run once; `plant` acts on the engine before update `planted` (or before each one from then on).

    `scaled` lists updates whose loss is multiplied by a thousand.
    """
    torch.set_num_threads(1)
    run_folder = RunFolder(folder)
    run_folder.claim()
    engine = make_engine(settings, build_model(settings), DistributedContext())
    scale_loss(engine, scaled)
    polled = 0

    def poll() -> bool:
        nonlocal polled
        if plant is not None and (polled == planted if once else polled >= planted):
            plant(engine)
        polled += 1
        return False

    with Heartbeat(folder, 0, 600) as beats:
        train(settings, engine, reader(), run_folder, beats, poll, say=lambda line: None)
    return engine


def events(folder: Path) -> list[dict[str, Any]]:
    """Returns the alarms in health.jsonl."""
    path = folder / "health.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@torch.no_grad()
def zero_stem(engine: Engine) -> None:
    """Plants a dead stem: all frames become equal."""
    for parameter in engine.module.model.frontend.parameters():
        parameter.zero_()


@torch.no_grad()
def break_stem(engine: Engine) -> None:
    """Plants NaN weights."""
    next(engine.module.model.frontend.parameters()).fill_(math.nan)


@torch.no_grad()
def one_code(engine: Engine) -> None:
    """Plants a collapsed code book: every target is the same code."""
    for name, tensor in [*engine.module.objective.named_buffers(), *engine.module.objective.named_parameters()]:
        if name.endswith("projection_DC") or name.startswith("quantizer.logits"):
            tensor.zero_()
        if name == "quantizer.logits.bias":
            tensor[0] = tensor[len(tensor) // 2] = 100.0


@torch.no_grad()
def same_prediction(engine: Engine) -> None:
    """Plants predictions that do not depend on their input."""
    for name, weight in engine.module.objective.named_parameters():
        if name in ("regression.weight", "project_prediction.weight"):
            weight.zero_()


@torch.no_grad()
def same_target(engine: Engine) -> None:
    """Plants contrastive targets that do not depend on their input."""
    engine.module.objective.get_parameter("project_target.weight").zero_()


@torch.no_grad()
def shrink_rank(engine: Engine) -> None:
    """Multiplies two channels of a log-mel stem until the rank of all later stages falls."""
    engine.module.model.frontend.get_parameter("linear.weight")[:2] *= 200.0


def skip_last_micro_batch(engine: Engine) -> None:
    """Makes the engine skip the last micro-batch of each update."""
    plain = engine.step

    def fewer(batches: Sequence[Batch], *more: Any, **named: Any) -> StepResult:
        return plain(batches[:-1], *more, **named)

    engine.step = fewer  # type: ignore[assignment, method-assign]


def scale_loss(engine: Engine, steps: tuple[int, ...]) -> None:
    """Multiplies the loss of these updates by a thousand."""

    def loud(_: nn.Module, given: tuple[Any, ...], made: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        loss, metrics = made
        return (1000 * loss if given[-1].step in steps else loss), metrics

    engine.module.register_forward_hook(loud)
