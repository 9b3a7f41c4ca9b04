"""A relay between this package and Flower: `FLOWER_PYTHON relay.py server|device …`, which imports flwr and no torch.

Flower's pins differ from those of training, so that it may live in an environment of its own. The relay is a child of
the server's engine, or of `auricle device`, and talks to it in frames over its standard input and output. At the
server it starts Flower's SuperLink and takes the place of its executor; at a device it is a node of the SuperLink
(`node.py`). A message is handed to the resident process, and no app is installed or run. Telemetry is off.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

HEADER = struct.Struct(">IQ")
MAX_BYTES = 2**34
"""Largest frame that is read."""
POLL_SECONDS = 0.2
READY_SECONDS = 60.0
GREETING_SECONDS = 600.0
"""Time in which a new device builds the run's model."""
OWN_ERROR = "0: "
"""Begin of errors that a device reports; Flower's own have other numbers."""
PR_SET_PDEATHSIG = 1
APP = b"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "auricle"
version = "0.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "auricle"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
"""
"""Flower wants an app for each run; this one is empty and never run."""


def write_frame(stream: IO[bytes], head: dict[str, Any], body: bytes = b"") -> None:
    """Writes a frame: lengths, a head as JSON, a body."""
    text = json.dumps(head).encode()
    stream.write(HEADER.pack(len(text), len(body)) + text)
    stream.write(body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Returns the next frame; None where the other side has ended.

    Raises:
        ValueError: it is larger than MAX_BYTES.
    """
    lengths = stream.read(HEADER.size)
    if len(lengths) < HEADER.size:
        return None
    head, body = HEADER.unpack(lengths)
    if head + body > MAX_BYTES:
        raise ValueError(f"a frame of {head + body} bytes")
    text, data = stream.read(head), stream.read(body)
    return None if len(text) < head or len(data) < body else (json.loads(text), data)


def start(name: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a program of Flower that ends with this process, however it ends."""

    program = Path(sys.executable).parent / name
    with log.open("ab") as out:
        return subprocess.Popen(
            [str(program), *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=end_with_parent
        )


def end_with_parent(by: int = signal.SIGKILL) -> None:
    """Makes the system send this process a signal when its parent ends, however it ends; Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by)


def secret_file(folder: Path) -> Path:
    """Returns a new file with a secret by which the relay alone may take tasks."""
    path = folder / "relay.secret"
    # as `data_pipeline.core.atomic_files.write_secret`, which this script cannot import: its environment has no auricle
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as out:
        out.write(secrets.token_hex(32))
    return path


def beside(name: str) -> Any:
    """Returns a module beside this script, which runs without a package, also where Python ignores its folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Runtime:
    """Takes tasks of one kind from the SuperLink on this machine."""

    def __init__(self, address: str, kind: str, secret: Path) -> None:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
        from flwr.supercore.retry import make_simple_http_retry_invoker
        from flwr.supercore.runtime import RuntimeHttpClient

        self.address, self._kind = address, kind
        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=secret.read_text("ascii").strip().encode(),
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def tokens(self) -> Iterator[str]:
        """Yields the token of each task as it comes."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        while True:
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
            if found.HasField("task") and found.token:
                yield found.token
            time.sleep(POLL_SECONDS)


def serve(arguments: argparse.Namespace, commands: BinaryIO, answers: BinaryIO) -> None:
    """Starts a SuperLink and carries messages between the engine and the nodes."""
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import context_from_proto, fab_to_proto, run_from_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.runtime_pb2 import PullTaskInputRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    secure_sum = beside("secure_sum")
    folder = Path(arguments.folder)
    secret = secret_file(folder)
    flags = ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    flags += ["--host", arguments.host, "--port", str(arguments.port), "--disable-runtime-dependency-installation"]
    flags += ["--insecure"]  # on the loopback alone, see flower.py
    process = start("flower-superlink", flags, folder / "superlink.log")
    address = f"{arguments.host}:{arguments.port}"
    wait_for_port(arguments.host, arguments.port, process, folder / "superlink.log")

    content, _ = build_fab_from_files({"pyproject.toml": APP, "nothing.py": b"app = None\n"})
    control = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    control.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
    runtime = Runtime(address, "flwr-serverapp", secret)
    token = next(runtime.tokens())
    grid = HttpGrid(runtime_api_address=address, insecure=True, token=token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heartbeat.start()
    given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    run = run_from_proto(given.run)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run.run_id, given.context.node_id
    grid.set_run(run)
    write_frame(answers, {"ready": address})

    arrivals = beside("arrivals").Arrivals(grid)
    mail = Mail(arrivals)
    while (frame := read_frame(commands)) is not None:
        head, body = frame
        if process.poll() is not None:
            raise RuntimeError(f"the SuperLink ended with {process.returncode}; see {folder / 'superlink.log'}")
        if head["do"] == "nodes":
            nodes = [str(number) for number in grid.get_node_ids()]
            for answer, data in mail.greet(nodes, head["head"], body):
                write_frame(answers, answer, data)
            write_frame(answers, {"nodes": nodes})
            continue
        if head["do"] == "sum":
            asked = head["nodes"], head["head"], body, head["seconds"], head["least"]
            included, mean = secure_sum.mean_of(arrivals, context_from_proto(given.context), *asked)
            write_frame(answers, {"nodes": included}, mean)
            continue
        sent = mail.send(head["nodes"], head["head"], body, head["seconds"])
        deadline = time.monotonic() + head["seconds"]
        while sent and time.monotonic() < deadline:
            for answer, data in mail.replies(sent):
                write_frame(answers, answer, data)
            time.sleep(POLL_SECONDS)
        write_frame(answers, {"end": True})


class Mail:
    """Requests to nodes and their replies, as frames.

    Args:
        grid: `Arrivals`.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._greeted: set[str] = set()
        self._greetings: dict[str, str] = {}

    def send(self, nodes: list[str], head: dict[str, Any], body: bytes, seconds: float) -> dict[str, str]:
        """Sends a request to nodes, which have `seconds` to answer it; returns number of the message -> node."""
        from flwr.app import ConfigRecord, Message, RecordDict

        record = RecordDict({"request": ConfigRecord({"head": json.dumps(head), "body": body})})
        messages = [Message(record, dst_node_id=int(node), message_type="train", ttl=seconds + 60.0) for node in nodes]
        sent = dict(zip(self._grid.push_messages(messages), nodes, strict=True))
        sent.pop(None, None)
        return sent

    def replies(self, sent: dict[str, str]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the frames of new replies, and removes them from `sent`."""
        for reply in self._grid.pull_messages(list(sent)):
            node = sent.pop(reply.metadata.reply_to_message_id, "")
            if reply.has_error():
                yield {"node": node, "error": f"{reply.error.code}: {reply.error.reason}"}, b""
                continue
            record = reply.content.config_records.get("answer", {})
            text, data = record.get("head", "{}"), record.get("body", b"")
            known = json.loads(text) if isinstance(text, str) and len(text) < 2**16 else {}
            yield {"node": node, "head": known}, data if isinstance(data, bytes) else b""

    def greet(self, nodes: list[str], head: dict[str, Any], body: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Sends a greeting to new nodes, and yields the answers that came meanwhile; never waits for one.

        A node that is lost before it answers, or too slow, is greeted again while it is connected.
        """
        self._greeted &= set(nodes)
        if new := [node for node in nodes if node not in self._greeted]:
            self._greetings |= self.send(new, head, body, GREETING_SECONDS)
            self._greeted |= set(new)
        if self._greetings:
            for frame, data in self.replies(self._greetings):
                if frame.get("error", OWN_ERROR).startswith(OWN_ERROR):
                    yield frame, data
                else:
                    self._greeted.discard(frame["node"])


def work(arguments: argparse.Namespace, commands: BinaryIO, answers: BinaryIO) -> None:
    """Connects to the SuperLink as a node and carries messages between it and the resident device."""
    from flwr.app import ConfigRecord, Error, Message, RecordDict

    secure_sum, node = beside("secure_sum"), beside("node")

    def resident(head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        write_frame(answers, {"head": head}, body)
        frame = read_frame(commands)
        if frame is None:
            raise EOFError("the device ended")
        if "error" in frame[0]:
            raise ValueError(frame[0]["error"])
        return frame

    def compute(head: dict[str, Any], body: bytes) -> bytes:
        return resident(head, body)[1]

    def answer(message: Any, context: Any) -> Any:
        try:
            if secure_sum.is_stage(message):
                return secure_sum.answer_stage(message, context, compute)
            record = message.content.config_records.get("request", {})
            text, data = resident(json.loads(record["head"]), record["body"])
            content = RecordDict({"answer": ConfigRecord({"head": json.dumps(text), "body": data})})
            return Message(content, reply_to=message)
        except (ValueError, KeyError, TypeError) as error:
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    write_frame(answers, {"ready": arguments.server})
    node.serve(arguments.server, arguments.poll_seconds, answer, commands)


def wait_for_port(host: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a program listens.

    Args:
        host, port: address on which it will listen.
        process: the program.
        log: its log, quoted in the message.

    Raises:
        RuntimeError: it ended, or does not listen in time.
    """
    import socket

    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
            return
        time.sleep(POLL_SECONDS)
    tail = log.read_text("utf-8", errors="replace")[-500:] if log.exists() else ""
    raise RuntimeError(f"{log.stem} does not listen on {host}:{port}; {log} ends with: {tail}")


def main() -> int:
    """Runs the relay until its parent closes the standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("server", "device"))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--server", default="")
    parser.add_argument("--poll-seconds", type=float, default=POLL_SECONDS)
    arguments = parser.parse_args()
    # a node signs off before it ends
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_parent(signal.SIGKILL if arguments.role == "server" else signal.SIGTERM)
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": arguments.folder}
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Flower prints must not mix with frames
    try:
        (serve if arguments.role == "server" else work)(arguments, sys.stdin.buffer, answers)
    except KeyboardInterrupt:
        return 1  # ended by a signal, or the SuperLink does not know this node any more, as after a restart
    except (RuntimeError, OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            write_frame(answers, {"failed": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # heartbeats of Flower run in threads
