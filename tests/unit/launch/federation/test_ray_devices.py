"""Devices as Ray tasks: found by their folders, and the same bits as devices of this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.core.schema import ConfigError, dump, load
from launch.exit_codes import ExitCode
from launch.federation.ray_devices import RayDevices, device_folders
from launch.main import main
from pretrain.federated.config import DeviceConfig
from pretrain.federated.device import Device
from pretrain.interfaces.engine_configs import FederatedConfig
from pretrain.interfaces.frames import StepContext
from tests.support.federation import InProcessDevices, server, settings
from tests.support.tiny_shards import sounds, write_shards

NAMES = ("ann", "bob", "eve", "max")


def test_each_subfolder_is_a_device(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "one" / name).mkdir(parents=True)
    (tmp_path / "two" / "eve").mkdir(parents=True)
    (tmp_path / "one" / "notes.txt").write_text("no device")
    assert device_folders([str(tmp_path / "one")]) == {name: str(tmp_path / "one" / name) for name in NAMES}
    with pytest.raises(ConfigError, match="two devices are named eve"):
        device_folders([str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(ConfigError, match=r"data.shards=.*each subfolder is a device's shards"):
        device_folders([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match=r"transport.*secure=true"):
        load(FederatedConfig, {"transport": "ray", "secure": True, "min_devices": 3})


def test_a_run_without_device_folders_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["pretrain", "+experiment=federated_tiny", f"runs={tmp_path / 'runs'}", "device=cpu", "launcher.processes=1"]
    fields = ["engine.federated.transport=ray", f"data.shards={tmp_path / 'none'}"]
    assert main([*run, *fields]) == ExitCode.USAGE
    assert "each subfolder is a device's shards, and there is none" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_rounds_of_ray_tasks_are_those_of_this_process(tmp_path: Path) -> None:
    for name in NAMES:
        write_shards(tmp_path / name, [sounds([1.0] * 12, corpus=name)])
    data = {
        "shards": str(tmp_path), "batch_seconds": 16.0, "micro_batches": 4, "min_seconds": 0.5, "max_seconds": 2.0,
        "workers": 0,
    }  # fmt: skip
    config = settings({"per_round": 3, "min_devices": 3, "answer_seconds": 120.0, "transport": "ray"}, data=data)
    made = {
        name: Device(dump(config), DeviceConfig(server="127.0.0.1:1", shards=str(tmp_path / name), device="cpu"))
        for name in NAMES
    }
    here = server(config, InProcessDevices({name: (lambda m, d=each: [d.answer(m)]) for name, each in made.items()}))
    tasks = RayDevices(dump(config), "")
    try:
        there = server(config, tasks)  # type: ignore[arg-type]
        for step in range(3):
            ctx = StepContext(config.seed, step)
            for engine in (here, there):
                assert engine.step([], ctx, 1e-3).metrics["federated/devices"][0] == 3
    finally:
        tasks.close()
        for device in made.values():
            device.close()
    theirs = dict(there.tensors())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in here.tensors())
