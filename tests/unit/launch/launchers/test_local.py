"""Local runs: the right ranks start, their logs and exit codes come back, and no process outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from launch.config import LocalConfig
from launch.launchers.local import LocalSubmitter, failure_report
from launch.workflows.attended_run import attend
from tests.support.paths import ROOT

STAND_IN = "tests.support.stand_in_rank"


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalSubmitter]:
    """Makes a submitter whose ranks run the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(act: str, processes: int = 2, engine: str = "deepspeed") -> LocalSubmitter:
        monkeypatch.setenv("STAND_IN", act)
        return LocalSubmitter(LocalConfig(processes=processes), engine, "cpu", module=STAND_IN)

    return make


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid_file: Path) -> bool:
    status = Path("/proc") / pid_file.read_text() / "status"
    return status.exists() and "State:\tZ" not in status.read_text()


def test_two_ranks_under_deepspeed(tmp_path: Path, submit: Callable[..., LocalSubmitter]) -> None:
    assert attend(submit("finish"), tmp_path, 5, LocalConfig(processes=2)) == 0
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text().split() for rank in (0, 1)]
    assert [log[:4] for log in logs] == [["rank", "0", "of", "2"], ["rank", "1", "of", "2"]]
    assert logs[0][-1] == logs[1][-1] != "port", "both ranks meet at one port"


def test_one_local_process_needs_no_launcher(tmp_path: Path, submit: Callable[..., LocalSubmitter]) -> None:
    assert attend(submit("finish", processes=1, engine="local"), tmp_path, 5, LocalConfig(processes=2)) == 0
    assert "rank 0 of 1 at no port" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_too_few_steps_are_no_success(
    tmp_path: Path, submit: Callable[..., LocalSubmitter], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attend(submit("finish", processes=1, engine="local"), tmp_path, 6, LocalConfig(processes=2)) == 1
    assert "ended after step 5 of 6" in capsys.readouterr().err


def test_a_failed_rank_ends_all_and_is_quoted(
    tmp_path: Path, submit: Callable[..., LocalSubmitter], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attend(submit("fail"), tmp_path, 5, LocalConfig(processes=2)) == 1
    said = capsys.readouterr().err
    assert "rank 1 did not like its data" in said
    assert "rank_1.log" in said
    assert not alive(tmp_path / "pid_0")
    assert not alive(tmp_path / "helper_0")


def test_cancel_leaves_no_process(tmp_path: Path, submit: Callable[..., LocalSubmitter]) -> None:
    submitter = submit("hang", processes=1, engine="local")
    handle = submitter.submit(tmp_path)
    wait_for((tmp_path / "helper_0").exists)
    assert submitter.status(handle) == "running"
    submitter.cancel(handle)
    assert submitter.status(handle) == "failed"
    assert not any(alive(file) for file in [*tmp_path.glob("pid_*"), *tmp_path.glob("helper_*")])


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_leaves_no_process(
    tmp_path: Path, submit: Callable[..., LocalSubmitter], sign: signal.Signals
) -> None:
    ranks, engine = (2, "deepspeed") if sign == signal.SIGKILL else (1, "local")
    submit("hang")
    code = (
        "import sys, time; from pathlib import Path; from launch.config import LocalConfig; from launch import local\n"
        f"s = local.LocalSubmitter(LocalConfig(processes={ranks}), '{engine}', 'cpu', module='{STAND_IN}')\n"
        "s.submit(Path(sys.argv[1])); time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_for(lambda: all((tmp_path / f"helper_{rank}").exists() for rank in range(ranks)))
    os.kill(launcher.pid, sign)
    launcher.wait()
    processes = [*tmp_path.glob("pid_*"), *tmp_path.glob("helper_*")]
    assert len(processes) == 2 * ranks
    wait_for(lambda: not any(map(alive, processes)), seconds=25)


def test_ctrl_c_asks_for_a_checkpoint(
    tmp_path: Path,
    submit: Callable[..., LocalSubmitter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitter, pressed = submit("until_stop", processes=1, engine="local"), [False]

    def follow(folder: Path, steps: int, running: Callable[[], bool]) -> None:
        if not pressed[0]:
            pressed[0] = True
            raise KeyboardInterrupt
        wait_for(lambda: not running())

    monkeypatch.setattr("launch.runs.follow.follow", follow)
    assert attend(submitter, tmp_path, 5, LocalConfig(processes=2)) == 130
    assert "stopped after step 3" in capsys.readouterr().out


def test_the_launcher_is_quoted_when_no_rank_spoke(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").write_text("step 1\n")
    (tmp_path / "logs" / "launcher.log").write_text("exits with return code = -9\n")
    assert "return code = -9" in failure_report(tmp_path)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.launchers.local.gpu_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"device=cuda.*no GPU"):
        LocalSubmitter(LocalConfig(), "local", "cuda")
    monkeypatch.setattr("launch.launchers.local.gpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"launcher.processes=3.*has 2"):
        LocalSubmitter(LocalConfig(processes=3), "local", "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=MIG-1234: .* by number only"):
        LocalSubmitter(LocalConfig(processes=1), "deepspeed", "auto")
    assert LocalSubmitter(LocalConfig(processes=1), "local", "auto").processes == 1
