"""Devices of a federated run on the machine of its server: `python -m launch.workers.device RUN_FOLDER`.

Under `srun` the process is the device of its task. With `--all N` it starts the server and N devices, and ends with the
server. Device number K has the Kth subfolder of `data.shards`, counted from 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.federation.ray_devices import device_folders
from launch.workers import federated_device
from launch.workers.environment import RANK_LOGS, log_to
from pretrain.checkpointing.run_folder import read_config
from pretrain.config import Config
from pretrain.federated.config import DeviceConfig


def device_of(run: Path, number: int) -> DeviceConfig:
    """Returns the config of a device of a run.

    Args:
        run: the run folder.
        number: of the device, counted from 0.

    Raises:
        ConfigError: `data.shards` has no subfolder for it.
    """
    config = load(Config, read_config(run))
    folders = device_folders(config.data.shards, needed=number + 1)
    name, shards = list(folders.items())[number]
    return DeviceConfig(
        server=config.engine.federated.server,
        shards=shards,
        name=name,
        device=config.device,
        workers=config.data.workers,
    )


def main(arguments: Sequence[str]) -> int:
    """Runs one device until it is stopped, or a server with all of its devices to the server's end."""
    parser = argparse.ArgumentParser("launch.workers.device")
    parser.add_argument("run", type=Path)
    parser.add_argument("--number", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--all", type=int, default=0, help="start the server and so many devices")
    given = parser.parse_args(arguments)
    if given.all:
        return _run_all(given.run, given.all)
    if os.environ.get(RANK_LOGS) == "1":
        log_to(given.run / "logs" / f"device_{given.number}.log")
    try:
        federated_device.run(device_of(given.run, given.number))
    except ConfigError as error:
        print(f"device {given.number}: {error}", file=sys.stderr, flush=True)
        return ExitCode.USAGE
    except KeyboardInterrupt:  # or SIGTERM, at the server's end
        return ExitCode.STOPPED


def _run_all(run: Path, devices: int) -> int:
    worker = [sys.executable, "-u", "-m", "launch.workers.device", str(run)]
    started = [subprocess.Popen([*worker, "--number", str(number)]) for number in range(devices)]
    try:
        return subprocess.call([sys.executable, "-u", "-m", "launch.workers.rank", str(run)])
    finally:
        for device in started:
            device.terminate()
        for device in started:
            device.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
