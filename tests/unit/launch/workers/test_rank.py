"""Exit codes of ranks: which failures a launcher retries, and how a superseded start ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.core.loopback import free_port
from data_pipeline.core.schema import ConfigError, dump, load
from data_pipeline.shards.local import ShardError
from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.workers import rank
from launch.workers.build import build
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import EngineConfig
from pretrain.engines.distributed import DistributedContext
from pretrain.monitoring.health_monitor import UnhealthyError
from tests.support.paths import ROOT
from tests.support.training import config

RANK = """
import os, sys, types
from pathlib import Path
from torch import distributed as dist
import launch.workers.build, pretrain.train
from launch.workers import rank
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.monitoring.health_monitor import UnhealthyError

def build(config, world, folder):
    reader = types.SimpleNamespace(close=lambda: None)
    return types.SimpleNamespace(engine=None, reader=reader, held_out=None)

def train(run, **more):
    if sys.argv[2] == "superseded" and os.environ["RANK"] == "0":
        RunFolder(run.path).claim()
    dist.barrier()
    raise UnhealthyError("it does not learn")

launch.workers.build.build, pretrain.train.train = build, train
code = rank.main(sys.argv[1])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize(("case", "code"), [("superseded", ExitCode.SUPERSEDED), ("alone", ExitCode.UNHEALTHY)])
def test_a_superseded_rank_exits_with_its_code_and_writes_no_marker(tmp_path: Path, case: str, code: int) -> None:
    """This includes rank 1, which claims no start number itself."""
    (tmp_path / "config.json").write_text(json.dumps(dump(config())))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), case],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], said
    assert (tmp_path / "UNHEALTHY").exists() == (code == ExitCode.UNHEALTHY)


@pytest.fixture
def rank_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], ExitCode]:
    """Returns a function that gives the exit code of a rank whose start raises an exception."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def end(error: Exception) -> ExitCode:
        def build(*_: object) -> None:
            raise error

        monkeypatch.setattr("launch.workers.build.build", build)
        (tmp_path / "config.json").write_text(json.dumps(dump(config())))
        return rank.main(str(tmp_path))

    return end


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.shards is empty"), ExitCode.USAGE),
        (ShardError("shard-0.tar", "checksum mismatch"), ExitCode.FAILED),
        (ValueError("step_00000010: damaged"), ExitCode.FAILED),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ExitCode.FAILED),
        (json.JSONDecodeError("truncated", "{", 1), ExitCode.FAILED),
        (ConnectionError("s3://bucket does not answer"), ExitCode.FAILED),
        (PermissionError("s3://bucket: 403"), ExitCode.FAILED),
        (OverflowError("not an expected error"), None),
        (UnhealthyError("the loss does not fall"), ExitCode.UNHEALTHY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_config_and_health_errors_are_never_retried(
    rank_that_raises: Callable[[Exception], ExitCode], error: Exception, code: ExitCode | None
) -> None:
    if code is None:  # a defect: the process prints its traceback and exits with FAILED
        with pytest.raises(type(error)):
            rank_that_raises(error)
    else:
        assert rank_that_raises(error) is code
        assert (code in NEVER_RETRY) == isinstance(error, ConfigError | UnhealthyError)


def test_a_damaged_config_file_is_a_failure_and_a_wrong_value_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    codes = []
    for text in ('{"train": ', "[]", '{"train": {"steps": "x"}}', '{"train": {"steps": 5}, "nonsense": 1}'):
        (tmp_path / "config.json").write_text(text)
        codes.append(rank.main(str(tmp_path)))
    assert codes == [ExitCode.FAILED, ExitCode.FAILED, ExitCode.FAILED, ExitCode.USAGE]


def test_an_objective_that_cannot_be_built_is_a_config_error(tmp_path: Path) -> None:
    settings = config(objective={"name": "hubert", "predict_layers": [9]})
    with pytest.raises(ConfigError, match="predict_layers"):
        build(settings, DistributedContext(), RunFolder(tmp_path))


def test_a_rank_without_a_run_folder_exits_with_usage() -> None:
    ended = subprocess.run([sys.executable, "-m", "launch.workers.rank"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == ExitCode.USAGE
    assert "RUN_FOLDER" in ended.stderr


def test_a_round_that_waits_for_devices_does_not_count_as_hung() -> None:
    rounds = {"attempts": 3, "wait_seconds": 600, "answer_seconds": 3600}
    federated = load(EngineConfig, {"name": "federated", "federated": rounds})
    assert rank.longest_phase(federated) == 3 * (600 + 4 * 3600)
    assert rank.longest_phase(load(EngineConfig, {"name": "federated", "timeout_minutes": 1000})) == 60_000
    assert rank.longest_phase(load(EngineConfig, {"name": "torch", "federated": rounds})) == 1800
