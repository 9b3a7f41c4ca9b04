"""Federated runs in this process: devices with synthetic audio, and what can go wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.core.types import Cursor
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.federated.device import DeviceAudio, DeviceEngine
from pretrain.federated.secure_server import SecureEngine
from pretrain.federated.server import FederatedEngine, RoundReader
from pretrain.federated.transport import Reply
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.train import train
from pretrain.train_module import build_model
from tests.support.synthetic_reader import SyntheticReader
from tests.support.training import config

TINY = (
    "data.batch_seconds=12", "data.min_seconds=0.5", "data.max_seconds=2", "data.micro_batches=3",
    "encoder.layers=1", "encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=32",
    "train.media_every=0", "health.on_collapse=warn",
)  # fmt: skip
"""Fields of a tiny run of the recipe federated_tiny with three devices a round."""
WORLD = DistributedContext()
Spoil = Callable[[bytes], list[bytes]]
"""Returns the messages that arrive in place of an answer."""


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
    """Devices of this process, as a transport.

    Args:
        answers: by device, the messages that arrive after a request; none where the device does not answer.
        close: called at the end.
    """

    def __init__(
        self, answers: Mapping[str, Callable[[bytes], list[bytes]]], close: Callable[[], None] = lambda: None
    ) -> None:
        self.names = list(answers)
        self.asked: list[list[str]] = []
        self._answers, self._close = answers, close

    def present(self) -> Sequence[str]:
        return self.names

    def ask(self, names: Sequence[str], request: bytes, seconds: float) -> list[Reply]:
        self.asked.append(list(names))
        order = list(reversed(names))  # any order
        return [Reply(name, message) for name in order for message in self._answers[name](request)]

    def sum(self, names: Sequence[str], request: bytes, seconds: float, least: int) -> tuple[list[str], bytes]:
        vectors = {reply.device: np.frombuffer(reply.message, "<f4") for reply in self.ask(names, request, seconds)}
        if len(vectors) < least:
            return [], b""
        mean = np.mean([vectors[name] for name in sorted(vectors)], axis=0, dtype=np.float64)
        return sorted(vectors), mean.tobytes()

    def close(self) -> None:
        self._close()


def synthetic_devices(config: Config, count: int, spoil: dict[str, Spoil] | None = None) -> InProcessDevices:
    """Returns devices `d0` … that share the micro-batches of the synthetic reader.

    Args:
        config: the run's config.
        count: number of devices.
        spoil: by device, the messages that arrive in place of its answer.
    """
    engine = DeviceEngine(build_model(config), config.engine, config.optimizer, WORLD)

    def device(number: int) -> Callable[[bytes], list[bytes]]:
        name, reader = f"d{number}", SyntheticReader(number % 4, min(count, 4))
        audio = DeviceAudio(reader, lambda step: Cursor("synthetic", step // 10, step % 10))
        spoilt = (spoil or {}).get(name, lambda message: [message])
        return lambda request: spoilt(engine.answer(request, name, audio))

    return InProcessDevices({f"d{number}": device(number) for number in range(count)})


def server(
    config: Config, devices: InProcessDevices, notes: list[tuple[int, str, str]] | None = None
) -> FederatedEngine:
    """Returns the engine of a server that asks `devices`; `notes` receives what is left out."""
    kept = [] if notes is None else notes
    kind = SecureEngine if config.engine.federated.secure else FederatedEngine
    return kind(
        build_model(config),
        config,
        WORLD,
        devices,
        run="run",
        secret="secret",
        note=lambda step, device, reason: kept.append((step, device, reason)),
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
