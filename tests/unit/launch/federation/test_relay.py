"""The relay to Flower, as far as it runs without Flower: frames, its secret, and programs that do not start."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.federation import relay
from launch.federation.relay import HEADER, read_frame, secret_file, wait_for_port, write_frame


def test_frames_arrive_as_they_were_sent_and_end_with_the_stream() -> None:
    stream = io.BytesIO()
    write_frame(stream, {"do": "ask", "nodes": ["1", "ü"]}, b"\x00" * 1000)
    write_frame(stream, {"end": True})
    whole = stream.getvalue()
    stream.seek(0)
    assert read_frame(stream) == ({"do": "ask", "nodes": ["1", "ü"]}, b"\x00" * 1000)
    assert read_frame(stream) == ({"end": True}, b"")
    assert read_frame(stream) is None
    assert read_frame(io.BytesIO(whole[:500])) is None
    with pytest.raises(ValueError, match="a frame of"):
        read_frame(io.BytesIO(HEADER.pack(10, 2**40)))


def test_the_secret_is_new_at_each_start_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    first = secret_file(tmp_path)
    found = first.read_text()
    assert first.stat().st_mode & 0o777 == 0o600
    assert len(found) == 64
    assert secret_file(tmp_path).read_text() != found


def test_a_port_is_waited_for_until_the_program_listens_or_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "POLL_SECONDS", 0.01)
    log = tmp_path / "superlink.log"
    log.write_text("the port is in use\n")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as waiting:
            wait_for_port("127.0.0.1", port, waiting, log)
            waiting.communicate(b"\n")
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        ended.wait()
        with pytest.raises(RuntimeError, match=rf"superlink does not listen on 127.0.0.1:{port}.*the port is in use"):
            wait_for_port("127.0.0.1", port, ended, log)
