"""Local runs: ranks, logs and exit codes; every stop saves a checkpoint; no process outlives its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_pipeline.core.loopback import free_port
from data_pipeline.core.schema import ConfigError
from launch.config import LocalConfig
from launch.exit_codes import ExitCode
from launch.launchers.local import LocalSubmitter, failure_report, threads_per_rank
from launch.launchers.process_guard import LEAST_GRACE, grace_seconds
from launch.launchers.processes import find_process
from launch.workflows.attended_run import run_attended
from pretrain.checkpointing.locate import steps_done
from tests.support.paths import ROOT

STAND_IN = "tests.support.stand_in_rank"


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalSubmitter]:
    """Returns a factory of submitters whose ranks run the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(act: str, processes: int = 2, engine: str = "deepspeed") -> LocalSubmitter:
        monkeypatch.setenv("STAND_IN", act)
        return LocalSubmitter(LocalConfig(processes=processes), engine, "cpu", module=STAND_IN)

    return make


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def alive(pid_file: Path) -> bool:
    status = Path("/proc") / pid_file.read_text() / "status"
    return status.exists() and "State:\tZ" not in status.read_text()


def test_two_ranks_under_deepspeed(tmp_path: Path, submit: Callable[..., LocalSubmitter]) -> None:
    assert run_attended(submit("finish"), tmp_path, 5, LocalConfig(processes=2)) == 0
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text().split() for rank in (0, 1)]
    assert [log[:4] for log in logs] == [["rank", "0", "of", "2"], ["rank", "1", "of", "2"]]
    assert logs[0][-1] == logs[1][-1] != "port", "both ranks use one rendezvous port"


def test_a_single_process_runs_without_the_deepspeed_launcher(
    tmp_path: Path, submit: Callable[..., LocalSubmitter]
) -> None:
    assert run_attended(submit("finish", processes=1, engine="local"), tmp_path, 5, LocalConfig(processes=2)) == 0
    assert "rank 0 of 1 at no port" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_a_run_that_ends_before_its_last_step_is_a_failure(
    tmp_path: Path, submit: Callable[..., LocalSubmitter], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_attended(submit("finish", processes=1, engine="local"), tmp_path, 6, LocalConfig(processes=2)) == 1
    assert "ended after step 5 of 6" in capsys.readouterr().err


def test_a_failed_rank_ends_all_ranks_and_its_log_is_quoted(
    tmp_path: Path, submit: Callable[..., LocalSubmitter], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_attended(submit("fail"), tmp_path, 5, LocalConfig(processes=2)) == 1
    said = capsys.readouterr().err
    assert "rank 1 cannot read its data" in said
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
        "import sys, time; from pathlib import Path; from launch.config import LocalConfig\n"
        "from launch.launchers import local\n"
        f"config = LocalConfig(processes={ranks}, grace_seconds=1)\n"
        f"s = local.LocalSubmitter(config, '{engine}', 'cpu', module='{STAND_IN}')\n"
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
    assert run_attended(submitter, tmp_path, 5, LocalConfig(processes=2)) == 130
    assert "stopped after step 3" in capsys.readouterr().out


FRONT = f"""
import sys
from pathlib import Path
from launch.config import LocalConfig
from launch.launchers.local import LocalSubmitter
from launch.workflows.attended_run import run_attended
config = LocalConfig(processes=1)
sys.exit(run_attended(LocalSubmitter(config, "torch", "cpu", module="{STAND_IN}"), Path(sys.argv[1]), 5, config))
"""
AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_unshare() -> bool:
    return subprocess.run([*AS_PROCESS_1, "true"], capture_output=True, check=False).returncode == 0


def test_signals_to_the_front_process_wait_until_the_ranks_have_saved(
    tmp_path: Path, submit: Callable[..., LocalSubmitter]
) -> None:
    """The save takes longer than the default time between SIGTERM and SIGKILL."""
    cases = {"term": signal.SIGTERM, "hup": signal.SIGHUP, "kill": signal.SIGKILL}
    if can_unshare():  # process 1 of a container ignores signals for which it has no handler
        cases |= {"term_1": signal.SIGTERM, "hup_1": signal.SIGHUP}
    submit("slow_save", processes=1, engine="torch")
    fronts = {}
    for name in cases:
        command = [*AS_PROCESS_1 * name.endswith("_1"), sys.executable, "-c", FRONT, str(tmp_path / name)]
        fronts[name] = subprocess.Popen(command)
    for name, sign in cases.items():
        wait_for((tmp_path / name / "pid_0").exists)
        process = psutil.Process(fronts[name].pid)
        os.kill(process.children()[0].pid if name.endswith("_1") else process.pid, sign)
    codes = {name: front.wait(timeout=60) for name, front in fronts.items()}
    for name in cases:
        wait_for((tmp_path / name / "checkpoints" / "latest").exists)
        assert steps_done(tmp_path / name) == 3, name
    assert codes.pop("kill") == -signal.SIGKILL
    assert set(codes.values()) == {ExitCode.INTERRUPTED}


def test_a_second_signal_kills_the_ranks_at_once(tmp_path: Path, submit: Callable[..., LocalSubmitter]) -> None:
    submit("hang", processes=1, engine="torch")
    front = subprocess.Popen([sys.executable, "-c", FRONT, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert front.stderr is not None
    wait_for((tmp_path / "helper_0").exists)
    front.terminate()
    while "saving a checkpoint" not in front.stderr.readline():
        pass
    front.terminate()
    front.wait(timeout=20)
    assert not any(alive(file) for file in [*tmp_path.glob("pid_*"), *tmp_path.glob("helper_*")])


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("0", 4), ("2,1", 4), (None, 4)])
def test_threads_of_a_rank_follow_the_environment(
    given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_per_rank(0, processes=2) == threads
    assert threads_per_rank(5, processes=2) == 5


def test_the_grace_period_follows_from_the_time_per_update(tmp_path: Path) -> None:
    assert grace_seconds(tmp_path, 0) == LEAST_GRACE, "the run has not started yet"
    started = tmp_path / "incarnations" / "1"
    started.parent.mkdir()
    started.touch()
    os.utime(started, (time.time() - 100, time.time() - 100))
    assert 300 <= grace_seconds(tmp_path, 0) - LEAST_GRACE < 360, "an update may have lasted since the start"
    rows = [(1, 100.0), (2, 118.0), (4, 130.0), (4, 900.0), (5, 906.0)]  # resumed after step 4
    lines = [json.dumps({"step": step, "time": time}) for step, time in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "ti')
    assert grace_seconds(tmp_path, 0) == LEAST_GRACE + 3 * 18.0
    (tmp_path / "metrics.jsonl").write_text("\n".join(["x" * 100_000, *lines]))
    assert grace_seconds(tmp_path, 0) == LEAST_GRACE + 3 * 18.0, "only the end of the file is read"
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\x00[]\n3\n")
    assert 300 <= grace_seconds(tmp_path, 0) - LEAST_GRACE < 360, "as before the first update"
    assert grace_seconds(tmp_path, 7) == 7


@pytest.mark.parametrize(
    "handle", ["--user=root", "1", "1:2", "0:1.5", "-1:1.5", "1:1.5;2:1.5", "1:1.5\n", "99999999999:1.5", "", "1:nan"]
)
def test_a_malformed_handle_is_refused(handle: str) -> None:
    with pytest.raises(ValueError, match="PROCESS_ID:START_TIME"):
        find_process(handle)


def test_a_process_with_another_start_time_is_not_the_job(submit: Callable[..., LocalSubmitter]) -> None:
    me = psutil.Process()
    assert find_process(f"{me.pid}:{me.create_time()}") == me
    assert find_process(f"{me.pid}:{me.create_time() + 1}") is None
    submit("finish").cancel(f"{me.pid}:{me.create_time() + 1}")  # this process must not be killed


def test_local_ranks_listen_on_the_loopback_only(tmp_path: Path) -> None:
    """The rendezvous store accepts keys from any client that can connect."""
    code = (
        "import sys, psutil; from pretrain.engines import distributed\n"
        "world = distributed.join('cpu', 1.0)\n"
        "found = [c.laddr.ip for c in psutil.Process().net_connections('tcp') if c.status == psutil.CONN_LISTEN]\n"
        "print(sorted(set(found)), flush=True); world.agree('', 'nothing')"
    )
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    found = [rank.communicate(timeout=120)[0].decode().strip() for rank in ranks]
    assert found[0] == "['127.0.0.1']"
    assert found[1] in ("['127.0.0.1']", "[]")


def test_the_launcher_log_is_quoted_when_no_rank_logged_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").write_text("step 1\n")
    (tmp_path / "logs" / "launcher.log").write_text("exits with return code = -9\n")
    assert "return code = -9" in failure_report(tmp_path)


def test_cuda_is_refused_on_machines_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
