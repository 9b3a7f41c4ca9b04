"""Flower's SuperLink and its nodes as the transport of a federated run, through a relay process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_pipeline.core.loopback import split_address
from data_pipeline.core.schema import ConfigError
from launch.federation.relay import read_frame, write_frame
from pretrain.federated.transport import Reply

ENVIRONMENT = "AURICLE_FLOWER"
"""Variable that names the folder of an environment with Flower, where this one has none."""
VERSION = "1.42.0"
HINT = f"python -m venv FOLDER && FOLDER/bin/pip install flwr=={VERSION} && export {ENVIRONMENT}=FOLDER"


def find_flower() -> str:
    """Returns the Python interpreter of an environment with Flower.

    Raises:
        ConfigError: there is none; the message says how to make one.
    """
    if folder := os.environ.get(ENVIRONMENT, ""):
        python = Path(folder).expanduser() / "bin" / "python"
        if not (python.parent / "flower-superlink").exists():
            raise ConfigError(f"{ENVIRONMENT}={folder}: there is no Flower in it; {HINT}")
        return str(python)
    if importlib.util.find_spec("flwr") is None:
        raise ConfigError(f"engine.name=federated needs Flower (flwr) between server and devices: {HINT}")
    return sys.executable


class Relay:
    """The relay process of a server or device; it ends with this one.

    Args:
        arguments: of `relay.py`.
        folder: for logs and keys.

    Raises:
        ConfigError: there is no Flower.
        RuntimeError: the SuperLink does not start.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("relay.py")
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        with (folder / "relay.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_flower(), str(script), *arguments, "--folder", str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables,
            )  # fmt: skip
        self._log = folder / "relay.log"
        self.receive()

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Writes a frame to the relay. Raises RuntimeError if it has ended."""
        try:
            write_frame(self._stream(self._process.stdin), head, body)
        except OSError as error:
            raise RuntimeError(f"the relay to Flower ended: {self._tail()}") from error

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Returns the next frame of the relay. Raises RuntimeError if it failed or has ended."""
        frame = read_frame(self._stream(self._process.stdout))
        if frame is None or "failed" in frame[0]:
            raise RuntimeError(f"the relay to Flower ended: {frame[0]['failed'] if frame else self._tail()}")
        return frame

    def close(self) -> None:
        """Ends the relay, and with it the SuperLink or the node."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                self._stream(stream).close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None  # both are pipes
        return stream

    def _tail(self) -> str:
        lines = self._log.read_text("utf-8", errors="replace").splitlines()[-3:]
        return f"{' '.join(lines)[-500:]} (see {self._log.parent})"


class FlowerDevices:
    """The devices of a run behind a SuperLink, by the names that they give themselves.

    A node is asked for its name when it is new; it gets the run's config and builds the model. Of two nodes with one
    name the newer one counts, since a device that was killed comes back as another node.

    Args:
        address: HOST:PORT to listen on.
        folder: for logs.
        config: the run's config as plain values, sent to each new device.
        say: receives a line for each device that comes, or cannot take part.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        config: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        host, port = split_address(address)
        self._say = say
        self._config = json.dumps(config).encode()
        self._relay = Relay(["server", "--host", host, "--port", str(port)], folder)
        self._names: dict[str, str] = {}
        """Node -> name."""

    def present(self) -> Sequence[str]:
        """Returns the names of the devices that are connected now; new ones are introduced to the run meanwhile."""
        self._relay.send({"do": "nodes", "head": {"hello": True}}, self._config)
        while "nodes" not in (frame := self._relay.receive())[0]:
            self._meet(*_answer(*frame)[:2])
        nodes = frame[0]["nodes"]
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        return sorted(set(self._names.values()))

    def ask(self, names: Sequence[str], request: bytes, seconds: float) -> Iterator[Reply]:
        """Sends a request to devices; yields what arrives within `seconds`."""
        wanted = [node for node, name in self._names.items() if name in names]
        for node, head, body in self._exchange(wanted, {"hello": False}, request, seconds):
            yield Reply(self._names[node], body, str(head.get("error", "")))

    def sum(self, names: Sequence[str], request: bytes, seconds: float, least: int) -> tuple[list[str], bytes]:
        """Asks devices for vectors by Flower's SecAgg+; returns those in the mean, and the mean as float64."""
        wanted = [node for node, name in self._names.items() if name in names]
        head = {"hello": False}
        self._relay.send({"do": "sum", "nodes": wanted, "seconds": seconds, "head": head, "least": least}, request)
        found, mean = self._relay.receive()
        return sorted(self._names[node] for node in found["nodes"]), mean

    def close(self) -> None:
        """Ends the SuperLink."""
        self._relay.close()

    def _meet(self, node: str, head: dict[str, Any]) -> None:
        """Takes the answer of a new node."""
        name, error = head.get("name"), head.get("error")
        if error or not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
            self._say(f"device of node {node} cannot take part: {str(error or 'it gives no name')[:300]}")
            return
        for older in [other for other, taken in self._names.items() if taken == name]:
            del self._names[older]
        self._names[node] = name
        self._say(f"device {name} is connected")

    def _exchange(
        self, nodes: list[str], head: dict[str, Any], body: bytes, seconds: float
    ) -> Iterator[tuple[str, dict[str, Any], bytes]]:
        self._relay.send({"do": "ask", "nodes": nodes, "seconds": seconds, "head": head}, body)
        while not (frame := self._relay.receive())[0].get("end"):
            yield _answer(*frame)


def _answer(found: dict[str, Any], data: bytes) -> tuple[str, dict[str, Any], bytes]:
    """Returns node, head (with `error` where it failed) and body of a reply."""
    known = found.get("head", {})
    error = {"error": found["error"]} if "error" in found else {}
    return str(found["node"]), {**(known if isinstance(known, dict) else {}), **error}, data


class DeviceRelay:
    """The connection of one device to its server, as a node of Flower.

    Args:
        server: HOST:PORT of the server on the loopback.
        poll_seconds: between looks for a request.
    """

    def __init__(self, server: str, poll_seconds: float) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="auricle-device-"))
        try:
            self.relay = Relay(["device", "--server", server, "--poll-seconds", str(poll_seconds)], self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def requests(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields requests; each must be answered through `answer` before the next."""
        while True:
            head, body = self.relay.receive()
            yield head.get("head", head), body

    def answer(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Sends the answer to the last request."""
        self.relay.send(head, body)

    def close(self) -> None:
        """Ends the node."""
        self.relay.close()
        shutil.rmtree(self._folder, ignore_errors=True)
