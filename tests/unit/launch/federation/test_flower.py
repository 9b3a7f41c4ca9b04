"""The way to Flower: what is refused before anything starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.federation.flower import ENVIRONMENT, find_flower
from launch.main import main
from pretrain.federated.config import DeviceConfig
from pretrain.federated.messages import decode
from pretrain.interfaces.engine_configs import FederatedConfig
from pretrain.interfaces.frames import StepContext
from tests.support.federation import server, settings, synthetic_devices


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


def test_the_server_of_a_run_on_ray_is_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "devices" / "ann").mkdir(parents=True)
    run = ["pretrain", "+experiment=federated_tiny", f"runs={tmp_path}", "device=cpu", "launcher=ray", "--dry-run"]
    tasks = ["engine.federated.transport=ray", f"data.shards={tmp_path / 'devices'}"]
    assert main([*run, *tasks]) == ExitCode.DONE
    assert "--workers=1 " in capsys.readouterr().out


AGGREGATE = """
import sys
import numpy as np
from flwr.server.strategy.aggregate import aggregate
given = np.load(sys.argv[1])
names = [name for name in given.files if name != "targets"]
parts = [([given[name][k] for name in names], int(n)) for k, n in enumerate(given["targets"])]
np.savez(sys.argv[2], **dict(zip(names, aggregate(parts))))
"""


@pytest.mark.slow
def test_federated_averaging_is_that_of_flower(tmp_path: Path) -> None:
    try:
        python = find_flower()
    except ConfigError as error:
        pytest.skip(str(error))
    rounds = {"rule": "fedavg", "local_steps": 2, "per_round": 3}
    config = settings(rounds, optimizer={"lr": 1.0})
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def keep(message: bytes) -> list[bytes]:
        tensors, fields = decode(message)
        seen[fields["device"]] = tensors
        return [message]

    engine = server(config, synthetic_devices(config, 3, {f"d{number}": keep for number in range(3)}))
    before = {name: parameter.detach().double().numpy().copy() for name, parameter in engine.module.named_parameters()}
    engine.step([], StepContext(config.seed, 0), 1.0)
    assert sorted(seen) == ["d0", "d1", "d2"]
    given = {
        name: np.stack([seen[device][f"update/{name}"].double().numpy() for device in sorted(seen)]) for name in before
    }
    targets = [float(seen[device]["counts_K"].sum()) for device in sorted(seen)]
    np.savez(tmp_path / "given.npz", targets=targets, **given)
    subprocess.run([python, "-c", AGGREGATE, tmp_path / "given.npz", tmp_path / "found.npz"], check=True, timeout=120)
    found = np.load(tmp_path / "found.npz")
    after = {name: parameter.detach().double().numpy() for name, parameter in engine.module.named_parameters()}
    furthest = max(float(np.abs(after[name] - before[name] - found[name]).max()) for name in before)
    assert furthest < 1e-6
    assert max(float(np.abs(found[name]).max()) for name in before) > 1e-3
