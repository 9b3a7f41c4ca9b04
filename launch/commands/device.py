"""auricle device: takes part in a federated run with the audio of this machine."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode
from pretrain.federated.config import DeviceConfig


def run(arguments: list[str]) -> int:
    """Answers the server of a run until it is stopped; returns after --help alone."""
    given = request.read("device", DeviceConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.workers import federated_device

    return federated_device.run(given.config)
