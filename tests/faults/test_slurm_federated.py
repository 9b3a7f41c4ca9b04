"""A federated run on a real SLURM cluster: server and devices as tasks of one job."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from launch import main
from launch.exit_codes import ExitCode
from launch.federation.flower import find_flower
from launch.runs.job_record import read_record
from tests.support.faults.mini_slurm import require_slurm, wait_for
from tests.support.faults.site import Site, site_at
from tests.support.federation import TINY
from tests.support.tiny_shards import sounds, write_shards

NAMES = ("ann", "bob", "eve")
ROUNDS = 12


def missing() -> str:
    """Returns why no Flower runs on the nodes; empty where one does."""
    try:
        python = find_flower()
    except ConfigError as error:
        return str(error)
    hidden = python.startswith("/tmp/")
    return f"AURICLE_FLOWER is below /tmp ({python}), of which each emulated node has its own" if hidden else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require_slurm()
    if reason := missing():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("slurm")
    for name in NAMES:
        write_shards(base / "devices" / name, [sounds([1.0] * 12, corpus=name)])
    with site_at(base, 1) as made:
        yield made


def command(site: Site, *fields: str) -> list[str]:
    paths = ("name=phones", f"runs={site.base}", f"data.shards={site.base / 'devices'}")
    slurm = ("launcher=slurm", "launcher.minutes=10", "launcher.warn_seconds=60", "launcher.cpus_per_task=1")
    rounds = ("engine.federated.per_round=3", "engine.federated.min_devices=2", "engine.federated.answer_seconds=10")
    steps = (f"train.steps={ROUNDS}", "train.checkpoint_every=4")
    return ["pretrain", "+experiment=federated_tiny", "device=cpu", *paths, *slurm, *TINY, *rounds, *steps, *fields]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_server_and_devices_are_tasks_of_one_job_and_a_killed_device_ends_no_other(site: Site) -> None:
    assert main.main(command(site, f"launcher.devices={len(NAMES)}")) == ExitCode.DONE
    site.handles["phones"] = read_record(site.base / "phones").handle
    rows = site.base / "phones" / "metrics.jsonl"

    def full_round() -> bool:
        return rows.exists() and any(row["federated/devices"] == len(NAMES) for row in read_rows(rows))

    wait_for(full_round, 200, "a round of all devices", lambda: site.log("phones"))
    devices = site.cluster.processes("n1", f"launch.workers.device {site.base / 'phones'}")
    devices = [pid for pid in devices if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    assert len(devices) == len(NAMES)
    with contextlib.suppress(ProcessLookupError):
        os.kill(devices[1], signal.SIGKILL)
    site.finish("phones", 200)
    found = read_rows(rows)
    assert [row["step"] for row in found] == list(range(1, ROUNDS + 1))
    assert found[-1]["federated/devices"] == len(NAMES) - 1
    logs = sorted(path.name for path in (site.base / "phones" / "logs").glob("device_*.log"))
    assert logs == [f"device_{number}.log" for number in range(len(NAMES))]
    print(f"seconds of rounds: {[round(row['federated/round_seconds'], 1) for row in found]}")
    wait_for(
        lambda: not site.cluster.processes("n1", "launch.workers.device"), 20, "the end of the devices",
        lambda: site.log("phones"),
    )  # fmt: skip


@pytest.mark.slow
def test_devices_on_several_nodes_are_refused_with_the_remedy(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command(site, "launcher.devices=3", "launcher.nodes=2", "name=wide")) == ExitCode.USAGE
    assert "reach it by SSH" in " ".join(capsys.readouterr().err.split())
    assert not (site.base / "wide").exists()
