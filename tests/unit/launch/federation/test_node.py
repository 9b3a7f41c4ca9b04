"""A device as a node of Flower: how fast it answers, how it leaves, and what it does when the server is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_pipeline.core.loopback import free_port
from data_pipeline.core.schema import ConfigError
from launch.federation import node
from launch.federation.flower import DeviceRelay, FlowerDevices, find_flower

try:
    find_flower()
    MISSING = ""
except ConfigError as error:
    MISSING = str(error)


def test_a_node_waits_for_the_server_and_ends_with_its_parent() -> None:
    read, write = os.pipe()
    answered: list[object] = []
    with os.fdopen(read, "rb") as parent:
        given = f"127.0.0.1:{free_port()}", 0.05, lambda message, context: answered.append(message), parent
        thread = threading.Thread(target=node.serve, args=given)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        os.close(write)
        thread.join(5.0)
        assert not thread.is_alive()
    assert not answered


class Site:
    """A SuperLink, and one device that answers with the bytes it was sent."""

    def __init__(self, folder: Path) -> None:
        self.address, self.folder = f"127.0.0.1:{free_port()}", folder
        self.lines: list[str] = []
        self.lost: list[str] = []
        self.server = FlowerDevices(self.address, folder / "server", {}, self.lines.append)
        self.connection = DeviceRelay(self.address, 0.2)
        self.thread = threading.Thread(target=self.answer)
        self.thread.start()

    def answer(self) -> None:
        try:
            for head, body in self.connection.requests():
                if body == b"fail":
                    self.connection.answer({"error": "ValueError: no audio"})
                else:
                    self.connection.answer({"name": "ann"} if head.get("hello") else {}, body)
        except RuntimeError as error:
            self.lost.append(str(error))

    def wait(self, devices: list[str], seconds: float = 20.0) -> float:
        start = time.monotonic()
        while self.server.present() != devices:
            assert time.monotonic() < start + seconds, self.lines
            time.sleep(0.1)
        return time.monotonic() - start


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.server.close()
    made.connection.close()
    made.thread.join(10.0)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_round_trip_of_a_megabyte_takes_less_than_two_seconds_and_an_error_has_its_reason(site: Site) -> None:
    site.wait(["ann"])
    seconds = []
    for number in range(10):
        body, start = bytes([number]) * 2**20, time.monotonic()
        replies = list(site.server.ask(["ann"], body, 10.0))
        seconds.append(time.monotonic() - start)
        assert [(reply.device, reply.message, reply.error) for reply in replies] == [("ann", body, "")]
    print(f"seconds of round trips: {sorted(round(value, 2) for value in seconds)}")
    assert sorted(seconds)[5] < 2.0
    (failed,) = site.server.ask(["ann"], b"fail", 10.0)
    assert "ValueError: no audio" in failed.error


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_device_that_comes_late_delays_nobody_and_takes_part_when_it_is_ready(site: Site) -> None:
    late = DeviceRelay(site.address, 0.2)
    try:
        site.wait(["ann"])
        requests = late.requests()
        greetings: list[tuple[dict[str, object], bytes]] = []
        thread = threading.Thread(target=lambda: greetings.append(next(requests)), daemon=True)
        thread.start()
        while thread.is_alive():
            assert site.server.present() == ["ann"]
            thread.join(0.1)
        start = time.monotonic()
        assert site.server.present() == ["ann"]  # the late one builds its model
        (reply,) = site.server.ask(["ann"], b"round", 10.0)
        assert reply.message == b"round"
        assert time.monotonic() - start < 5.0
        assert greetings == [({"hello": True}, b"{}")]
        late.answer({"name": "eve"})
        site.wait(["ann", "eve"])
        assert [reply.device for reply in site.server.ask(["ann", "eve"], b"round", 2.0)] == ["ann"]
        assert next(requests)[1] == b"round"
        late.answer({}, b"too late")
        assert [reply.message for reply in site.server.ask(["ann"], b"next", 10.0)] == [b"next"]
    finally:
        late.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("how", ["closes", "is terminated"])
def test_a_device_that_ends_signs_off(site: Site, how: str) -> None:
    site.wait(["ann"])
    if how == "closes":
        site.connection.close()
    else:
        (relay,) = [
            process for process in psutil.Process().children(recursive=True) if "device" in process.cmdline()[2:3]
        ]
        relay.send_signal(signal.SIGTERM)
    assert site.wait([]) < 10.0


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_device_reports_that_its_server_is_gone(site: Site) -> None:
    site.wait(["ann"])
    site.server.close()
    site.thread.join(30.0)
    assert site.lost
    assert "relay to Flower ended" in site.lost[0]
    with pytest.raises(OSError, match="refused"), socket.create_connection(site.address.split(":"), 1.0):
        pass
