"""Devices of a federated run as Ray tasks: a simulation of many devices, or devices on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.ray_tasks import RayClusterConfig, cluster
from data_pipeline.core.schema import ConfigError
from pretrain.federated.config import DeviceConfig
from pretrain.federated.device import Device, DeviceEngine, device_engine
from pretrain.federated.transport import Reply

ADDRESS = "engine.federated.ray"
NOWHERE = "127.0.0.1:1"
"""A device in a task connects to no server."""


def device_folders(shards: Sequence[str], needed: int = 1) -> dict[str, str]:
    """Returns the shards of each device by its name: the subfolders of the given folders, in the order of names.

    Args:
        shards: `data.shards`.
        needed: number of devices that are wanted.

    Raises:
        ConfigError: a folder is missing or has no subfolders, two devices have one name, or there are too few.
    """
    found: dict[str, str] = {}
    for folder in shards:
        inside = sorted(path for path in Path(folder).expanduser().glob("*") if path.is_dir())
        if not inside:
            raise ConfigError(
                f"data.shards={folder}: with launcher.devices or engine.federated.transport=ray each subfolder is a "
                "device's shards, and there is none; write them by `auricle preprocess out=FOLDER/NAME`"
            )
        for path in inside:
            if path.name in found:
                raise ConfigError(f"data.shards={folder}: two devices are named {path.name}; rename a folder")
            found[path.name] = str(path.absolute())
    if len(found) < needed:
        raise ConfigError(
            f"launcher.devices={needed}: data.shards={','.join(shards)} has {len(found)} subfolders with a device's "
            "shards each; write more by `auricle preprocess out=FOLDER/NAME`, or start fewer"
        )
    return found


class RayDevices:
    """Devices whose answers are Ray tasks; they are the subfolders of `data.shards`.

    A worker process builds the model once and serves any device. All devices count as connected.

    Args:
        config: the run's config as plain values.
        address: of a running Ray cluster; empty: Ray is started on this machine.
    """

    def __init__(self, config: dict[str, Any], address: str) -> None:
        self._folders = device_folders(config["data"]["shards"])
        self._stack = contextlib.ExitStack()
        self._ray = self._stack.enter_context(cluster(RayClusterConfig(address=address), field=ADDRESS))
        self._config = self._ray.put(json.dumps(config))
        self._task = self._ray.remote(_answer).options(name="device", num_cpus=1, max_retries=1)

    def present(self) -> Sequence[str]:
        """Returns the names of all devices."""
        return sorted(self._folders)

    def ask(self, names: Sequence[str], request: bytes, seconds: float) -> Iterator[Reply]:
        """Sends a request to devices; yields what arrives within `seconds`."""
        message, deadline = self._ray.put(request), time.monotonic() + seconds
        running = {self._task.remote(self._config, message, name, self._folders[name]): name for name in names}
        while running and (left := deadline - time.monotonic()) > 0:
            ready, _ = self._ray.wait(list(running), num_returns=1, timeout=left)
            for reference in ready:
                name = running.pop(reference)
                try:
                    yield Reply(name, self._ray.get(reference))
                except self._ray.exceptions.RayTaskError as error:
                    yield Reply(name, b"", f"{type(error.cause).__name__}: {error.cause}")
                except self._ray.exceptions.RayError as error:
                    yield Reply(name, b"", f"its worker died ({type(error).__name__})")
        for reference in running:
            self._ray.cancel(reference, force=True)

    def sum(self, names: Sequence[str], request: bytes, seconds: float, least: int) -> tuple[list[str], bytes]:
        """Refuses: tasks have no keys of their own."""
        raise ConfigError("engine.federated.secure=true: devices as Ray tasks cannot mask; use transport=flower")

    def close(self) -> None:
        """Stops Ray if it was started here."""
        self._stack.close()


@functools.lru_cache(maxsize=1)
def _engine(config: str) -> tuple[dict[str, Any], DeviceEngine]:
    torch.set_num_threads(1)
    values = json.loads(config)
    return values, device_engine(values, "cpu")


def _answer(config: str, request: bytes, name: str, shards: str) -> bytes:
    """Answers a request as one device, in a worker process of Ray."""
    values, engine = _engine(config)
    device = Device(values, DeviceConfig(server=NOWHERE, shards=shards, name=name, device="cpu"), engine)
    try:
        return device.answer(request)
    finally:
        device.close()
