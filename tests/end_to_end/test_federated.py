"""A server and its devices as real processes over Flower: killed at any time, the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.loopback import free_port
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError, dump, load
from launch.federation.flower import find_flower
from launch.main import main
from pretrain.config import Config
from pretrain.federated.config import DeviceConfig
from pretrain.federated.device import Device
from pretrain.federated.transport import Reply
from pretrain.interfaces.frames import StepContext
from pretrain.lr_schedule import learning_rate
from tests.support.federation import TINY, server
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards

NAMES = ("ann", "bob", "eve")

try:
    find_flower()
    MISSING = ""
except ConfigError as error:
    MISSING = str(error)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.timeout(1200)]


class Site:
    """Server and devices in processes, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.steps = folder, free_port(), 0
        self.more: list[str] = []
        """Further fields of the server."""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in NAMES:
            write_shards(folder / name, [sounds([1.0] * 12, corpus=name)])

    def start(self, name: str) -> None:
        address = f"127.0.0.1:{self.port}"
        words = ["device", f"server={address}", f"shards={self.folder / name}"]
        if name == "server":
            words = [
                "pretrain", "+experiment=federated_tiny", "device=cpu", "name=run", f"runs={self.folder}",
                *TINY, "engine.federated.per_round=3", "engine.federated.min_devices=3", "engine.federated.attempts=50",
                "engine.federated.answer_seconds=8", "engine.federated.wait_seconds=120",
                f"engine.federated.server={address}", f"train.steps={self.steps}", "train.checkpoint_every=1",
                "launcher.processes=1", *self.more,
            ]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "launch.main", *words],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """Kills a process and all that it started, at once."""
        process = self.running.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            for member in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait()

    def rounds(self) -> list[dict[str, float]]:
        path = self.folder / "run" / "metrics.jsonl"
        return read_rows(path) if path.exists() else []

    def wait(self, rounds: int, seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.rounds()) < rounds:
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for name in list(made.running):
        made.kill(name)


def in_this_process(site: Site, vectors: list[bytes] | None = None) -> dict[str, torch.Tensor]:
    """Returns the weights after the same rounds of the same devices, without Flower.

    `vectors` receives those of single devices under secure aggregation.
    """
    config = load(Config, json.loads((site.folder / "run" / "config.json").read_text()))
    devices = {
        name: Device(dump(config), DeviceConfig(server="127.0.0.1:1", shards=str(site.folder / name))) for name in NAMES
    }

    class Direct:
        def present(self) -> list[str]:
            return list(NAMES)

        def ask(self, names: list[str], request: bytes, seconds: float) -> list[Reply]:
            return [Reply(name, devices[name].answer(request)) for name in names]

        def sum(self, names: list[str], request: bytes, seconds: float, least: int) -> tuple[list[str], bytes]:
            found = [devices[name].answer(request) for name in names]
            if vectors is not None:
                vectors.extend(found)
            mean = np.mean([np.frombuffer(each, "<f4") for each in found], axis=0, dtype=np.float64)
            return list(names), mean.tobytes()

    engine = server(config, Direct())  # type: ignore[arg-type]
    for step in range(site.steps):
        lr = learning_rate(config.optimizer, config.schedule, config.train.steps, step)
        engine.step([], StepContext(config.seed, step), lr)
    for device in devices.values():
        device.close()
    return {name.removeprefix("model/"): t for name, t in engine.tensors() if name.startswith("model/")}


def random_victims(count: int) -> list[str]:
    return [str(name) for name in keyed_rng(0, "victims").choice(["server", *NAMES], count)]


@pytest.mark.parametrize("victims", [["bob", "server"], random_victims(10)], ids=["one of each", "ten random"])
def test_killed_server_and_devices_come_back_to_the_same_bits(site: Site, victims: list[str]) -> None:
    """After each round one process is killed, at a random moment of the next round, and started again."""
    site.steps = len(victims) + 3
    for name in ("server", *NAMES):
        site.start(name)
    for number, name in enumerate(victims):
        site.wait(number + 1)
        time.sleep(float(keyed_rng(number, "moment").uniform(0, 4)))
        site.kill(name)
        site.start(name)
    site.wait(site.steps)
    assert site.running.pop("server").wait(60) == 0, (site.folder / "server.log").read_text()[-3000:]
    found = load_file(site.folder / "run" / "checkpoints" / f"step_{site.steps:08d}" / "model.safetensors")
    expected = in_this_process(site)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    rows = site.rounds()
    assert [row["federated/devices"] for row in rows] == [3] * site.steps
    assert rows[-1]["federated/bytes_received"] > 0
    print(f"{len(victims)} kills of {', '.join(victims)}; seconds of rounds:")
    print([round(row["federated/round_seconds"], 1) for row in rows])


def test_no_file_of_the_server_holds_an_update_of_one_device_under_secure_aggregation(site: Site) -> None:
    site.steps, site.more = (
        2,
        [
            "engine.federated.secure=true",
            "engine.federated.clip=10",
            "engine.federated.answer_seconds=60",
            "optimizer.eps=1e-3",
        ],
    )
    for name in ("server", *NAMES):
        site.start(name)
    site.wait(site.steps, 300.0)
    assert site.running.pop("server").wait(60) == 0, (site.folder / "server.log").read_text()[-3000:]
    vectors: list[bytes] = []
    expected = in_this_process(site, vectors)
    found = load_file(site.folder / "run" / "checkpoints" / f"step_{site.steps:08d}" / "model.safetensors")
    furthest = max(float((found[name] - expected[name]).abs().max()) for name in found)
    assert furthest < 1e-4  # steps of 2**-29 of the clip norm, rounded at random
    files = [path for path in site.folder.rglob("*") if path.is_file() and path.parent.name not in NAMES]
    assert any("superlink" in path.name for path in files)
    kept = b"".join(path.read_bytes() for path in files)
    assert found["objective.classifiers.0.weight"].numpy().tobytes() in kept  # what is there is found
    for vector in vectors:
        values = np.frombuffer(vector, "<f4")
        for start in np.flatnonzero(values)[:: max(1, len(values) // 50)]:
            piece = values[start : start + 4]
            for scale in (1.0, 10.0):  # as sent, and times the clip norm
                for kind in ("<f4", "<f8"):
                    assert (piece * np.float32(scale)).astype(kind).tobytes() not in kept
    rows = site.rounds()
    print(f"seconds of rounds: {[round(row['federated/round_seconds'], 1) for row in rows]}; furthest {furthest:.1e}")


def test_one_command_starts_server_and_devices_and_ends_them(tmp_path: Path) -> None:
    for name in NAMES:
        write_shards(tmp_path / "devices" / name, [sounds([1.0] * 12, corpus=name)])
    fields = ("name=run", f"runs={tmp_path}", f"data.shards={tmp_path / 'devices'}", "launcher.devices=3", "device=cpu")
    rounds = (f"engine.federated.server=127.0.0.1:{free_port()}", "engine.federated.per_round=3")
    steps = ("engine.federated.min_devices=3", "engine.federated.wait_seconds=120", "train.steps=3")
    assert main(["pretrain", "+experiment=federated_tiny", *TINY, *fields, *rounds, *steps]) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["federated/devices"] for row in rows] == [3] * 3
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in process.info["cmdline"]]
    assert not left
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    shown = {tag.removeprefix("federated/") for tag in events.Tags()["scalars"] if tag.startswith("federated/")}
    assert {"devices", "asked", "left_out", "bytes_sent", "bytes_received", "round_seconds"} <= shown
    assert [event.step for event in events.Scalars("federated/bytes_sent")] == [1, 2, 3]


def test_a_run_without_enough_devices_ends_with_exit_code_1_and_names_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "devices" / "ann", [sounds([1.0] * 12, corpus="ann")])
    fields = ("name=run", f"runs={tmp_path}", f"data.shards={tmp_path / 'devices'}", "launcher.devices=1", "device=cpu")
    rounds = (f"engine.federated.server=127.0.0.1:{free_port()}", "engine.federated.per_round=3", "train.steps=3")
    waits = ("engine.federated.min_devices=3", "engine.federated.wait_seconds=60")
    assert main(["pretrain", "+experiment=federated_tiny", *TINY, *fields, *rounds, *waits]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "engine.federated.min_devices=3: 1 are connected after 60 s (ann)" in said
    assert "start devices (auricle device), or lower min_devices" in said
