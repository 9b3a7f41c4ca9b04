"""The way to Flower: what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.federation.flower import ENVIRONMENT, find_flower
from launch.main import main
from pretrain.federated.config import DeviceConfig
from pretrain.interfaces.engine_configs import FederatedConfig


def test_addresses_of_the_loopback_are_used_and_others_need_a_tunnel() -> None:
    for right in ("127.0.0.1:9092", "[::1]:1", "localhost:80", "127.0.0.2:9092"):
        load(DeviceConfig, {"server": right, "shards": "shards"})
        load(FederatedConfig, {"server": right})
    with pytest.raises(ConfigError, match=r"server=.*0\.0\.0\.0:9092.*ssh -N -L 9092:127\.0\.0\.1:9092"):
        load(DeviceConfig, {"server": "0.0.0.0:9092", "shards": "shards"})
    for wrong in ("127.0.0.1", "localhost:", ":9092", "localhost:70000"):
        with pytest.raises(ConfigError, match="write HOST:PORT"):
            load(FederatedConfig, {"server": wrong})


def test_a_server_of_several_processes_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["pretrain", "+experiment=federated_tiny", f"runs={tmp_path}", "device=cpu", "launcher.processes=2"]
    assert main(run) == ExitCode.USAGE
    assert "the server is one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_flower_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Flower in it; python -m venv .* flwr=="):
        find_flower()


def test_a_device_without_shards_or_server_ends_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["device", "server=127.0.0.1:9092", f"shards={tmp_path / 'none'}"]) == ExitCode.USAGE
    assert "there is no such folder; write it by `auricle preprocess`" in capsys.readouterr().err
    assert main(["device", "server=example.org:9092", f"shards={tmp_path}"]) == ExitCode.USAGE
    assert "ssh -N -L" in capsys.readouterr().err
