"""A device of a federated run: answers the server's requests until it is stopped."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from data_pipeline.core.schema import ConfigError
from launch.cli.signals import raised_signals
from launch.federation.flower import DeviceRelay
from pretrain.federated.config import DeviceConfig
from pretrain.federated.device import Device

AGAIN_SECONDS = 2.0
"""Pause before a device connects again."""


def run(own: DeviceConfig) -> NoReturn:
    """Connects to the server and answers its requests; connects again when the connection is lost.

    Only answers leave this machine: counts, sums of gradients or changes of weights, and sums of metrics.

    Raises:
        ConfigError: there are no shards, no Flower, or the server is not on the loopback.
    """
    if not Path(own.shards).expanduser().exists():
        raise ConfigError(f"shards={own.shards}: there is no such folder; write it by `auricle preprocess`")
    torch.set_num_threads(1)
    resident = _Resident(own)
    with raised_signals(), contextlib.closing(resident):
        _say(f"takes part in rounds of {own.server}; Ctrl-C ends this device")
        while True:
            try:
                resident.serve()
            except RuntimeError as error:
                _say(f"{error}; connecting again")
                time.sleep(AGAIN_SECONDS)


class _Resident:
    """The process that keeps model and audio between rounds."""

    def __init__(self, own: DeviceConfig) -> None:
        self._own = own
        self._device: Device | None = None
        self._config = b""

    def serve(self) -> None:
        """Answers requests over one connection. Raises RuntimeError when it is lost."""
        connection = DeviceRelay(self._own.server, self._own.poll_seconds)
        try:
            for head, body in connection.requests():
                try:
                    answer = self._introduce(body) if head.get("hello") else self._compute(body)
                except (ValueError, KeyError, OSError, FloatingPointError) as error:
                    _say(f"a request was refused: {error}")
                    answer = {"error": f"{type(error).__name__}: {error}"[:1000]}, b""
                connection.answer(*answer)
        finally:
            connection.close()

    def _introduce(self, config: bytes) -> tuple[dict[str, str], bytes]:
        """Builds the model of a run, and returns this device's name."""
        if self._device is None or config != self._config:
            self.close()
            self._device, self._config = Device(json.loads(config), self._own), config
            _say(f"takes part in a run as {self._device.name}")
        return {"name": self._device.name}, b""

    def _compute(self, request: bytes) -> tuple[dict[str, str], bytes]:
        if self._device is None:
            raise ValueError("asked for a round before the run was introduced")
        return {}, self._device.answer(request)

    def close(self) -> None:
        """Stops the reader."""
        if self._device is not None:
            self._device.close()
            self._device = None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
