"""The server of streaming recognition: many clients, and what bad ones do to the others (nothing)."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from aiohttp import ClientWebSocketResponse, WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.main import main
from launch.serving.config import ServeConfig
from launch.serving.server import MESSAGE_BYTES, Server, read_token
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from tests.support.contract_cases import speech_like
from tests.support.streams import pcm

Test = Callable[[TestClient[Any, Any], Server], Awaitable[None]]


def perform(recogniser: Recogniser, test: Test, token: str = "", left: int = 2, **fields: Any) -> None:
    """Runs a test with a server at a free port of this machine."""
    config = load(ServeConfig, {"checkpoint": "none", **fields})
    streams = StreamingRecogniser(recogniser, None, 4, left, max_minutes=config.max_minutes)

    async def go() -> None:
        server = Server(config, streams, token)
        async with TestClient(TestServer(server.app)) as client:
            await asyncio.wait_for(test(client, server), 60)

    asyncio.run(go())


def expected(recogniser: Recogniser, content: bytes) -> list[str]:
    streams = StreamingRecogniser(recogniser, None, 4, 2)
    wave_T = torch.frombuffer(bytearray(content), dtype=torch.int16).float() / 32_768
    state, [first] = streams.push(streams.start(), [wave_T])
    _, [last] = streams.finish(state)
    return [word.text for word in (*first.words, *last.words)]


async def finish(socket: ClientWebSocketResponse) -> list[dict[str, Any]]:
    """Ends a stream; returns all messages."""
    await socket.send_str('{"type": "finish"}')
    return await everything(socket)


async def everything(socket: ClientWebSocketResponse) -> list[dict[str, Any]]:
    return [json.loads(message.data) async for message in socket if message.type == WSMsgType.TEXT]


def words(messages: list[dict[str, Any]]) -> list[str]:
    return [word["word"] for message in messages if message["type"] == "final" for word in message["words"]]


async def all_released(server: Server) -> None:
    """Waits until the server has released every stream: a client may see its connection closed a moment before."""
    for _ in range(500):
        if not server.engine.streams:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{len(server.engine.streams)} streams were not released")


def test_clients_get_the_words_of_their_own_streams(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        async def one(seed: int, size: int) -> None:
            content = pcm(2.5, seed)
            async with client.ws_connect("/stream") as socket:
                for at in range(0, len(content), size):  # odd sizes split samples
                    await socket.send_bytes(content[at : at + size])
                    await asyncio.sleep(0)
                messages = await finish(socket)
            assert messages[0] == {"type": "ready", "delay_ms": 175, "chunk": 4, "left": 2}
            assert messages[-1] == {"type": "done"}
            assert words(messages) == expected(recogniser, content)
            partial = [message for message in messages if message["type"] == "partial"]
            assert partial
            assert all(message["text"].startswith(message["stable"]) for message in partial)
            assert all(message["latency_ms"] >= 0 for message in partial)

        await asyncio.gather(*(one(seed, size) for seed, size in ((1, 999), (2, 4_001), (3, 20_000), (4, 1_280))))
        await all_released(server)

    assert expected(recogniser, pcm(2.5, 1)) != expected(recogniser, pcm(2.5, 2))
    perform(recogniser, test)


def test_another_rate_is_resampled(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        async with client.ws_connect("/stream?rate=8000") as socket:
            await socket.send_bytes(pcm(1.0, 1))
            messages = await finish(socket)
        assert messages[-2]["seconds"] == pytest.approx(2.0, abs=0.1)
        for rate in ("0", "16k", "9" * 40):
            assert (await client.get(f"/stream?rate={rate}")).status == 400

    perform(recogniser, test)


BAD: dict[str, tuple[Callable[[ClientWebSocketResponse], Awaitable[None]], str]] = {
    "text": (lambda socket: socket.send_str("garbage"), "text messages must be"),
    "deep JSON": (lambda socket: socket.send_str("[" * 50_000), "text messages must be"),
    "other JSON": (lambda socket: socket.send_str('{"type": 1}'), "text messages must be"),
    "a huge message": (lambda socket: socket.send_bytes(bytes(MESSAGE_BYTES + 2)), ""),
    "silence": (lambda socket: asyncio.sleep(0), "nothing arrived for 1 seconds"),
}


def test_garbage_ends_one_stream_and_no_other(recogniser: Recogniser) -> None:
    sound = io.BytesIO()
    soundfile.write(sound, speech_like(0.1, 1).numpy(), 16_000, format="WAV")
    wav = sound.getvalue()[:400]

    async def test(client: TestClient[Any, Any], server: Server) -> None:
        content = pcm(2.5, 1)

        async def good() -> None:
            async with client.ws_connect("/stream") as socket:
                for at in range(0, len(content), 4_000):
                    await socket.send_bytes(content[at : at + 4_000])
                    await asyncio.sleep(0.05)
                assert words(await finish(socket)) == expected(recogniser, content)

        async def bad(send: Callable[[ClientWebSocketResponse], Awaitable[None]], said: str) -> None:
            async with client.ws_connect("/stream") as socket:
                await socket.send_bytes(content[:9_001])
                await send(socket)
                messages = await everything(socket)
            assert socket.closed
            if said:
                assert said in [message["error"] for message in messages if "error" in message][-1], messages

        async def file(content: bytes, said: str) -> None:
            async with client.ws_connect("/stream") as socket:
                for at in range(0, len(content), 40):
                    await socket.send_bytes(content[at : at + 40])
                messages = await everything(socket)
            assert said in messages[-1]["error"], messages

        files = [file(wav, "begins like a sound file (wav)"), file(b"hello " * 20, "the stream is text")]
        await asyncio.gather(good(), *files, *(bad(*case) for case in BAD.values()))
        await all_released(server)

    perform(recogniser, test, idle_seconds=1.0)


def test_a_flood_waits_in_its_own_queue(recogniser: Recogniser) -> None:
    """Clients that send 40 s at once and read nothing do not delay one that speaks in real time."""

    async def test(client: TestClient[Any, Any], server: Server) -> None:
        content, loud = pcm(2.0, 1), pcm(40.0, 2)

        async def flood() -> None:
            async with client.ws_connect("/stream") as socket:
                for at in range(0, len(loud), MESSAGE_BYTES // 2):
                    await socket.send_bytes(loud[at : at + MESSAGE_BYTES // 2])

        floods = [asyncio.create_task(flood()) for _ in range(3)]
        await asyncio.sleep(0.1)
        most, latencies = 0, []
        async with client.ws_connect("/stream") as socket:
            for at in range(0, len(content), 5_120):
                await socket.send_bytes(content[at : at + 5_120])
                await asyncio.sleep(0.16)
                most = max([most, *(stream.samples for stream in server.engine.streams)])
            messages = await finish(socket)
            latencies = [message["latency_ms"] for message in messages if message["type"] == "partial"]
        assert words(messages) == expected(recogniser, content)
        assert 16_000 < most < server.engine.limit + MESSAGE_BYTES
        assert max(latencies) < 1_500
        await asyncio.gather(*floods)

    perform(recogniser, test, queue_seconds=2.0)


def test_empty_messages_take_no_memory(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        async with client.ws_connect("/stream") as socket:
            await socket.send_bytes(pcm(0.05, 1))
            for _ in range(1_000):
                await socket.send_bytes(b"")
            await socket.send_bytes(pcm(0.05, 2))
            [stream] = server.engine.streams
            while stream.samples < 1_600:
                await asyncio.sleep(0.01)
            assert len(stream.waiting) == 2
            assert (await finish(socket))[-1] == {"type": "done"}

    perform(recogniser, test)


def test_a_client_that_disappears_leaves_nothing(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        for _ in range(3):
            socket = await client.ws_connect("/stream")
            await socket.send_bytes(pcm(1.0, 1))
            assert socket._response.connection is not None
            socket._response.connection.transport.abort()  # type: ignore[union-attr]
        await all_released(server)

    perform(recogniser, test)


def test_a_stream_that_cannot_go_on_ends_alone(recogniser: Recogniser) -> None:
    """With an unlimited left context a stream ends at max_minutes; those in the same batch go on."""

    async def test(client: TestClient[Any, Any], server: Server) -> None:
        async def one(seconds: float) -> list[dict[str, Any]]:
            async with client.ws_connect("/stream") as socket:
                await socket.send_bytes(pcm(seconds, 1))
                return await finish(socket)

        long, short = await asyncio.gather(one(1.9), one(0.9))
        assert "max_minutes=0.02" in long[-1]["error"]
        assert words(long), "what was heard until then is final"
        assert short[-1] == {"type": "done"}

    perform(recogniser, test, left=-1, max_minutes=0.02)


def test_only_so_many_clients(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        async with client.ws_connect("/stream"):
            with pytest.raises(WSServerHandshakeError, match="503"):
                await client.ws_connect("/stream")
        async with client.ws_connect("/stream") as socket:
            assert (await finish(socket))[-1] == {"type": "done"}

    perform(recogniser, test, clients=1)


def test_the_page_and_who_may_use_the_server(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        page = await client.get("/")
        assert page.status == 200
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        for path in ("/page.js", "/microphone.js", "/page.css"):
            assert (await client.get(path)).status == 200
        for path in ("/config.py", "/../config.py", "/page/page.js"):
            assert (await client.get(path)).status == 404
        assert (await client.get("/", headers={"Host": "evil.example"})).status == 403
        assert (await client.get("/stream", headers={"Origin": "http://evil.example"})).status == 403

    perform(recogniser, test)


def test_a_token_is_required_where_there_is_one(recogniser: Recogniser) -> None:
    async def test(client: TestClient[Any, Any], server: Server) -> None:
        for given in ("", "?token=", "?token=wrong", "?token=%C3%A4"):
            with pytest.raises(WSServerHandshakeError, match="401"):
                await client.ws_connect(f"/stream{given}")
        async with client.ws_connect("/stream?token=0123456789abcdef") as socket:
            assert (await finish(socket))[-1] == {"type": "done"}
        async with client.ws_connect("/stream", headers={"Authorization": "Bearer 0123456789abcdef"}) as socket:
            assert (await finish(socket))[-1] == {"type": "done"}

    perform(recogniser, test, token="0123456789abcdef")


def test_other_addresses_need_a_usable_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "checkpoint=none", "host=0.0.0.0"]) == ExitCode.USAGE
    assert "others can reach it: set token_file=FILE" in capsys.readouterr().err
    (tmp_path / "token").write_text("short\n")
    config = load(ServeConfig, {"checkpoint": "none", "host": "0.0.0.0", "token_file": str(tmp_path / "token")})
    with pytest.raises(ConfigError, match="the token has 5 characters; 16 or more"):
        read_token(config)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(load(ServeConfig, {"checkpoint": "none", "token_file": str(tmp_path / "none")}))


def test_the_command_serves_until_it_is_told_to_end(streaming_run: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "auricle",
        "serve",
        f"checkpoint={streaming_run}",
        "port=0",
        "chunk=4",
        "left=2",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=10) as page:
            assert b"streaming recognition" in page.read()
        port = address.split(":")[2].strip("/")
        second = [*command[:5], f"port={port}"]
        taken = subprocess.run(second, capture_output=True, text=True, timeout=60, check=False)
        assert taken.returncode == ExitCode.USAGE
        assert f"port={port}: " in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == ExitCode.DONE
