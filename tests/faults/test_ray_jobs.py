"""Ray Jobs on a real Ray cluster; network interfaces that Ray listens on; hostile names in an entrypoint."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.core.loopback import free_port
from launch import main
from launch.config import RayConfig
from launch.launchers.ray import RayJobs
from launch.launchers.ray_wait import succeeded
from launch.runs.job_record import read_record
from pretrain.checkpointing.locate import steps_done
from tests.support.faults import whole_chain
from tests.support.faults.mini_slurm import wait_for
from tests.support.faults.site import TOY
from tests.support.paths import ROOT
from tests.support.sounds import many, write_corpus

HOSTILE = "x$(touch pwned);`touch pwned`&touch pwned|'\" #"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a cluster of one node that requires a token; yields the address of its dashboard."""
    port, gcs = free_port(), free_port()
    folder = tmp_path_factory.mktemp("r")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={gcs}", f"--dashboard-port={port}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"]
    command += [f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}"]
    from ray._private.authentication_test_utils import reset_auth_token_state

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    reset_auth_token_state()  # read once per process: an earlier test may have run without a token
    with (folder / "said.txt").open("w") as said:
        ray = subprocess.Popen(command, stdout=said, stderr=said, env=dict(os.environ), start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address), 120, "the dashboard", lambda: (folder / "said.txt").read_text())
        yield address
    finally:
        family = [psutil.Process(ray.pid), *psutil.Process(ray.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        patch.undo()
        reset_auth_token_state()


def answers(address: str) -> bool:
    """Returns whether the dashboard accepts jobs."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(address).list_jobs()
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_chain_of_ray_jobs(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preprocessing and, after its success, a run; repeating the command skips both."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "speech", many(6, 2.0))
    toy = [f"pretrain.{line}" for line in (*TOY, "train.steps=4", f"name={HOSTILE.replace('/', '')}")]
    corpus = ["preprocess.corpus.path=speech", "preprocess.min_shards=2", "preprocess.report=false"]
    ray = ["launcher=ray", f"launcher.dashboard={head}", "launcher.workers=1"]
    chain = ["pipeline", "folder=work", "steps=[preprocess,pretrain]", *ray, *corpus, *toy]
    assert main.main(chain) == 0
    runs = tmp_path / "work" / "runs"
    note = read_record(runs / HOSTILE)
    submitter = RayJobs(RayConfig(**note.config))
    wait_for(
        lambda: submitter.status(note.handle) in ("done", "failed"), 300, "the run", lambda: submitter.logs(note.handle)
    )
    assert submitter.status(note.handle) == "done", submitter.logs(note.handle)
    assert steps_done(runs / HOSTILE) == 4
    assert submitter.status(read_record(runs / "preprocess").handle) == "done"
    assert not list(tmp_path.rglob("pwned"))
    before = read_record(runs / HOSTILE)
    assert main.main(chain) == 0
    assert read_record(runs / HOSTILE) == before, "no job was submitted again"
    assert main.main(["jobs", "status", str(runs / "preprocess")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_dashboard_is_on_the_loopback_and_requires_the_token(head: str) -> None:
    port = int(head.rpartition(":")[2])
    listening = [entry.laddr.ip for entry in psutil.net_connections("tcp") if is_server(entry, port)]
    assert listening == ["127.0.0.1"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head}/api/jobs/", timeout=10)


PREPROCESSING = """
from data_pipeline.core.ray_tasks import RayClusterConfig, cluster
with cluster(RayClusterConfig(num_cpus=1)):
    look()
"""
DRIVER = """
from launch.launchers import ray_driver
ray_driver.drive = look
ray_driver.main(["."])
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("started", [PREPROCESSING, DRIVER], ids=["preprocessing", "driver"])
def test_a_ray_that_auricle_starts_listens_on_the_loopback_only(started: str) -> None:
    """Checks all listening sockets of all of Ray's processes."""
    code = (
        "import psutil, sys\n"
        "def look(given=None):\n"
        "    import ray\n"
        "    ray.get(ray.remote(lambda: 1).remote())\n"
        "    family = {p.pid for p in psutil.Process().children(recursive=True)} | {psutil.Process().pid}\n"
        "    found = [c for c in psutil.net_connections('tcp') if c.pid in family and c.status == psutil.CONN_LISTEN]\n"
        "    print('LISTEN', *sorted({c.laddr.ip for c in found}), len(found))\n"
        f"{started}"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    said = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LISTEN"))
    assert int(said[-1]) >= 3
    assert set(said[:-1]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, said


def is_server(entry: Any, port: int) -> bool:
    return entry.status == psutil.CONN_LISTEN and entry.laddr.port == port


def test_a_job_that_depends_on_a_failed_job_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    states = iter(["PENDING", "FAILED"])
    assert not succeeded(lambda: next(states), "raysubmit_1")
    assert "raysubmit_1 is FAILED" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_pipeline_of_ray_jobs(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preprocessing, labels, pretraining and evaluation: each is a Ray Job that waits for the previous one."""
    monkeypatch.chdir(tmp_path)
    turns = whole_chain.ONE_TURN
    whole_chain.write(tmp_path)
    ray = ("launcher=ray", f"launcher.dashboard={head}", "launcher.workers=1")
    command = whole_chain.command(tmp_path, turns, *ray)
    assert main.main(command) == 0
    for name in whole_chain.names(turns):
        note = read_record(tmp_path / "whole" / "runs" / name)
        submitter = RayJobs(RayConfig(**note.config), note.command)
        ended = partial(has_ended, submitter, note.handle)
        wait_for(ended, 400, f"the end of {name}", partial(submitter.logs, note.handle))
        assert submitter.status(note.handle) == "done", submitter.logs(note.handle)
    whole_chain.require_whole(tmp_path, turns, command, capsys)


def has_ended(submitter: RayJobs, handle: str) -> bool:
    return submitter.status(handle) in ("done", "failed", "cancelled")
