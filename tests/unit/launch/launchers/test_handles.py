"""Job handles and addresses come from files and command lines; schedulers receive only well-formed ones."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.ray_tasks import RayClusterConfig, keep_token_private, require_answer
from data_pipeline.core.schema import ConfigError, load
from launch.config import RayConfig, SlurmConfig, TargetsJob
from launch.exit_codes import ExitCode
from launch.launchers import ray_driver, slurm
from launch.launchers.ray import RayJobs
from launch.launchers.slurm import SlurmError, SlurmSubmitter
from launch.workers import task
from launch.workers.stop_request import START_ID

HOSTILE = [
    "--user=root",
    "-u root",
    "1,2",
    "1 2",
    "1;2",
    "1_[0-9]",
    "1+2",
    "all",
    "0",
    "",
    "1\n2",
    "../1",
    "1?x=1",
    "١",
]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Returns the list of commands that would be sent to SLURM."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "ask", lambda *command: commands.append(command) or "")
    return commands


@pytest.mark.parametrize("handle", HOSTILE)
def test_malformed_slurm_job_ids_are_refused(handle: str, sent: list[tuple[str, ...]]) -> None:
    submitter = SlurmSubmitter(SlurmConfig())
    for use in (submitter.cancel, submitter.status):
        with pytest.raises(SlurmError, match="must be the id of a SLURM job"):
            use(handle)
    assert not sent


@pytest.mark.parametrize("handle", ["7", "1234567", "12_0", "12_3999"])
def test_slurm_job_and_array_task_ids_are_accepted(handle: str, sent: list[tuple[str, ...]]) -> None:
    submitter = SlurmSubmitter(SlurmConfig())
    submitter.cancel(handle)
    submitter.status(handle)
    assert sent[0] == ("scancel", "--", handle)
    assert all(handle in command[-1] or f"--jobs={handle}" in command for command in sent)


@pytest.mark.parametrize("handle", ["../nodes", "a/b", "-x", "", "a b", "a?b=c", "a#b", "a" * 101])
def test_malformed_ray_job_ids_are_refused(handle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    submitter = RayJobs(RayConfig(dashboard="http://127.0.0.1:1"))
    monkeypatch.setattr(submitter, "_client", lambda: None)
    for use in (submitter.cancel, submitter.status, submitter.logs):
        with pytest.raises(ValueError, match="submission id"):
            use(handle)


@pytest.mark.parametrize("kind", [RayConfig, SlurmConfig])
@pytest.mark.parametrize("after", ["--user=root", "1,2 --wrap=x", "1:2?3"])
def test_a_dependency_must_be_a_job_id(kind: type[Any], after: str) -> None:
    with pytest.raises(ConfigError, match="after"):
        load(kind, {"after": after})


@pytest.mark.parametrize(
    "address",
    ["evilmod://x", "evilmod://h:1", "os", "ray://", "ray://evil://h:1", "file:///x", "h:1/x", "ray:h:1", " auto"],
)
def test_addresses_that_make_ray_import_a_module_are_refused(address: str) -> None:
    for kind, field in ((RayClusterConfig, "address"), (RayConfig, "address"), (RayConfig, "dashboard")):
        with pytest.raises(ConfigError, match=field):
            load(kind, {field: address})
    for dashboard in ("ftp://h:1", "http://", "http://h:1?x=y", "http://u:p@h:1"):
        with pytest.raises(ConfigError, match="dashboard"):
            load(RayConfig, {"dashboard": dashboard})


def test_cluster_addresses_are_accepted() -> None:
    for address in ("", "auto", "local", "10.0.0.1:6379", "head-1.cluster:6379", "[fe80::1]:6379", "ray://head:10001"):
        assert (
            load(RayClusterConfig, {"address": address}).address
            == load(RayConfig, {"address": address}).address
            == address
        )
    for dashboard in ("", "http://127.0.0.1:8265", "https://ray.example.org", "http://head:8265/", "https://h/ray/x"):
        assert load(RayConfig, {"dashboard": dashboard}).dashboard == dashboard


class Silent(http.server.BaseHTTPRequestHandler):
    """A server that accepts requests and never answers."""

    def do_GET(self) -> None:
        time.sleep(3)


class Foreign(http.server.BaseHTTPRequestHandler):
    """A server that is not Ray."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(params=["dead", "silent", "foreign"])
def address_without_ray(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yields a HOST:PORT where no Ray cluster listens."""
    if request.param == "dead":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            yield f"127.0.0.1:{probe.getsockname()[1]}"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent if request.param == "silent" else Foreign)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_address_without_ray_is_reported_within_the_timeout(address_without_ray: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        require_answer(address_without_ray, 2.0)
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        require_answer(f"ray://{address_without_ray}", 2.0)
    with pytest.raises(ConfigError, match="no Ray dashboard answers there"):
        RayJobs(RayConfig(dashboard=f"http://{address_without_ray}", answer_seconds=1.0)).status("raysubmit_1")
    assert time.monotonic() - begin < 10


def test_a_dead_address_is_reported_by_the_field_that_the_user_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a run, whose driver is a process, and for a program that uses Ray itself."""
    monkeypatch.setenv(START_ID, "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    assert ray_driver.main([str(tmp_path), f"--address={address}", "--answer-seconds=2"]) == ExitCode.USAGE
    assert f"launcher.address={address}: no Ray cluster" in capsys.readouterr().err
    job = TargetsJob(shards=("s",), out="o", runs=str(tmp_path))
    with pytest.raises(ConfigError, match=f"launcher\\.address={address}: no Ray cluster"):
        task.perform_on_cluster(task.prepare("targets", job), RayConfig(address=address, answer_seconds=2.0))


@pytest.mark.parametrize("before", ["absent", "folder", "token", "link"])
def test_the_ray_token_is_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".ray"
    if before == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o755)
        folder.symlink_to(tmp_path / "elsewhere")
    elif before != "absent":
        folder.mkdir(mode=0o755)
    if before == "token":
        (folder / "auth_token").write_text("secret")
        (folder / "auth_token").chmod(0o644)
    keep_token_private()
    (folder / "later").write_text("secret")  # files that Ray writes later
    assert folder.stat().st_mode & 0o777 == 0o700
    if before == "token":
        assert (folder / "auth_token").stat().st_mode & 0o777 == 0o600
