"""Federated runs in this process: devices with synthetic audio, and what can go wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.types import Cursor
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.federated.device import DeviceAudio, DeviceEngine
from pretrain.federated.rounds import RoundReader
from pretrain.federated.server import FederatedEngine
from pretrain.federated.transport import Reply
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.train import train
from pretrain.train_module import build_model
from tests.support.synthetic_reader import SyntheticReader
from tests.support.training import config

WORLD = DistributedContext()
Spoil = Callable[[bytes], list[bytes]]
"""What arrives in place of an answer."""


def settings(engine: dict[str, Any] | None = None, **top: Any) -> Config:
    """Returns the config of a tiny federated run without dropout."""
    rounds = {"answer_seconds": 1.0, "wait_seconds": 0.01, "min_devices": 1} | (engine or {})
    encoder = {
        "name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64,
        "dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0,
    }  # fmt: skip
    values = {"encoder": encoder, "engine": {"name": "federated", "federated": rounds}} | top
    return config(**values)


class InProcessDevices:
    """Devices `d0` … that share the micro-batches of the synthetic reader.

    Args:
        config: the run's config.
        count: number of devices.
        spoil: by device, what becomes of its answers; without an entry they arrive as they are.
    """

    def __init__(self, config: Config, count: int, spoil: dict[str, Spoil] | None = None) -> None:
        self.names = [f"d{number}" for number in range(count)]
        self.spoil = spoil or {}
        self.asked: list[list[str]] = []
        self._engine = DeviceEngine(build_model(config), config.engine, config.optimizer, WORLD)
        self._audio = {
            name: DeviceAudio(
                SyntheticReader(number % 4, min(count, 4)), lambda step: Cursor("synthetic", step // 10, step % 10)
            )
            for number, name in enumerate(self.names)
        }

    def present(self) -> Sequence[str]:
        return self.names

    def ask(self, names: Sequence[str], request: bytes, seconds: float) -> list[Reply]:
        self.asked.append(list(names))
        replies = []
        for name in reversed(names):  # any order
            answer = self._engine.answer(request, name, self._audio[name])
            replies += [Reply(name, message) for message in self.spoil.get(name, lambda message: [message])(answer)]
        return replies

    def close(self) -> None:
        """Does nothing."""


def server(
    config: Config, devices: InProcessDevices, notes: list[tuple[int, str, str]] | None = None
) -> FederatedEngine:
    """Returns the engine of a server that asks `devices`; `notes` receives what is left out."""
    kept = [] if notes is None else notes
    return FederatedEngine(
        build_model(config),
        config,
        WORLD,
        devices,
        "run",
        "secret",
        lambda step, device, reason: kept.append((step, device, reason)),
    )


def run(folder: Path, config: Config, devices: InProcessDevices, stop_after: int | None = None) -> FederatedEngine:
    """Trains a server as launch.workers.rank does, until the end or a stop request after `stop_after` rounds."""
    torch.set_num_threads(1)
    run_folder = RunFolder(folder)
    run_folder.claim()
    engine = server(config, devices)
    polls = iter(range(10**6))

    def stop() -> bool:
        return stop_after is not None and next(polls) + 1 >= stop_after

    train(config, engine, RoundReader(devices), run_folder, Heartbeat(folder, 0, 600), stop, say=lambda line: None)
    return engine
