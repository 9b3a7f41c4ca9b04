"""Devices beside the server of a run: which shards each has, and what cannot be started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, dump
from launch.config import LocalConfig, SlurmConfig
from launch.exit_codes import ExitCode
from launch.launchers.local import LocalSubmitter
from launch.launchers.slurm import SlurmSubmitter
from launch.main import main
from launch.workers import device
from launch.workers.environment import RANK_LOGS
from tests.support.training import config

FEDERATED = ("pretrain", "+experiment=federated_tiny", "device=cpu")


def run_with_devices(tmp_path: Path, names: str) -> Path:
    for name in names:
        (tmp_path / "devices" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir()
    values = dump(config(data={"shards": [str(tmp_path / "devices")]}, device="cpu"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    return tmp_path / "run"


def test_each_device_has_a_subfolder_of_the_shards(tmp_path: Path) -> None:
    run = run_with_devices(tmp_path, "ba")
    found = [device.device_of(run, number) for number in (0, 1)]
    assert [(own.name, own.shards) for own in found] == [(name, str(tmp_path / "devices" / name)) for name in "ab"]
    assert found[0].server == "127.0.0.1:9092"
    with pytest.raises(ConfigError, match=r"launcher.devices=3: .*has 2 subfolders"):
        device.device_of(run, 2)


def test_a_device_without_shards_ends_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(RANK_LOGS, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert device.main([str(run_with_devices(tmp_path, "a"))]) == ExitCode.USAGE
    assert "device 1: launcher.devices=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["launcher.devices=3"], "launcher.devices=3: data.shards=DEVICES has 2 subfolders"),
        (["launcher.devices=2", "engine.federated.transport=ray"], "devices are Ray tasks; leave one of them out"),
        (["launcher.devices=2", "engine.name=torch"], "devices belong to engine.name=federated"),
        (["launcher.devices=2", "launcher=slurm", "launcher.nodes=2"], "reach it by SSH (docs/federated.md)"),
        (["launcher.devices=2", "launcher=slurm", "launcher.elastic=true"], "leave out launcher.elastic=true"),
        (["launcher.devices=2", "launcher=ray"], "launcher.devices"),
    ],
)  # fmt: skip
def test_devices_that_cannot_be_started_are_refused(
    fields: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with_devices(tmp_path, "ab")
    shards = f"data.shards={tmp_path / 'devices'}"
    assert main([*FEDERATED, f"runs={tmp_path / 'runs'}", shards, *fields]) == ExitCode.USAGE
    printed = " ".join(capsys.readouterr().err.split())
    assert said.replace("DEVICES", str(tmp_path / "devices")) in printed
    assert not (tmp_path / "runs").exists()


def test_devices_are_tasks_of_the_job_and_children_here(tmp_path: Path) -> None:
    words = SlurmSubmitter(SlurmConfig(devices=3)).command(tmp_path)
    assert "--ntasks-per-node=4" in words
    assert words[words.index("--devices") + 1] == "3"
    here = LocalSubmitter(LocalConfig(devices=3), "federated", "cpu").command(tmp_path, 1)
    assert here[-5:] == ["-m", "launch.workers.device", str(tmp_path), "--all", "3"]
