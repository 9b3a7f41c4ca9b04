"""The server of `auricle serve`: a web page, and a WebSocket that takes PCM and answers with text.

Protocol of `/stream?rate=16000[&token=…]`: the client sends binary messages of raw 16-bit little-endian mono PCM, of
any size up to MESSAGE_BYTES, and `{"type": "finish"}` as text at the end. The server sends JSON: `ready`, then
`partial` and `final` results, `done` after the last one, or `error` before it closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.pcm import HEADER_BYTES, PcmStream, refuse_other_than_pcm
from data_pipeline.core.loopback import is_loopback
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from launch.serving.config import ServeConfig
from launch.serving.engine import ClientStream, StreamingEngine, StreamResult
from pretrain.recognition.recogniser import open_recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from pretrain.recognition.transcript import word_values

MESSAGE_BYTES = 1 << 16
RATES = (8_000, 192_000)
PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.js": "page.js", "/microphone.js": "microphone.js", "/page.css": "page.css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
LEAST_TOKEN = 16
SEND_SECONDS = 10.0
"""Time to deliver a message, after which a client is disconnected."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves one model. `app` is the aiohttp application."""

    def __init__(self, config: ServeConfig, recogniser: StreamingRecogniser, token: str = "") -> None:
        self.config, self.recogniser, self.token = config, recogniser, token
        self.engine = StreamingEngine(recogniser, config.queue_seconds, config.queue_results)
        self.app = web.Application(middlewares=[self._guard])
        for path in FILES:
            self.app.router.add_get(path, self._page)
        self.app.router.add_get("/stream", self._stream)
        self.app.cleanup_ctx.append(self._computing)

    async def _computing(self, app: web.Application) -> Any:
        task = asyncio.create_task(self.engine.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses requests of other sites' pages, and those without the token."""
        host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
        if not self.token and not is_loopback(host.strip("[]")):
            raise web.HTTPForbidden(text="this server answers at localhost only")
        origin = request.headers.get("Origin", "")
        if origin and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(text="a page of another site may not use this server")
        if self.token and request.path == "/stream":
            given = request.query.get("token") or request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise web.HTTPUnauthorized(text="the token is missing or wrong: add ?token=… to the address")
        return await handler(request)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE / FILES[request.path], headers=HEADERS)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        rate = request.query.get("rate", str(SAMPLE_RATE))
        if not (rate.isascii() and rate.isdigit() and RATES[0] <= int(rate) <= RATES[1]):
            raise web.HTTPBadRequest(text=f"rate={rate[:20]}: must be a number from {RATES[0]} to {RATES[1]}")
        if len(self.engine.streams) >= self.config.clients:
            raise web.HTTPServiceUnavailable(text=f"all {self.config.clients} places are taken; try again later")
        socket = web.WebSocketResponse(max_msg_size=MESSAGE_BYTES, heartbeat=20.0)
        stream = self.engine.open_stream()
        try:
            await socket.prepare(request)
            await self._talk(socket, stream, int(rate))
        finally:
            self.engine.close(stream)
        return socket

    async def _talk(self, socket: web.WebSocketResponse, stream: ClientStream, rate: int) -> None:
        model = self.recogniser.model
        ready = {"chunk": model.chunking.chunk, "left": model.chunking.left_chunks}
        await send(socket, {"type": "ready", "delay_ms": round(1e3 * model.delay_seconds)} | ready)
        sending = asyncio.create_task(self._answer(socket, stream))
        reading = asyncio.create_task(self._listen(socket, stream, rate))
        try:
            done, _ = await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
            if reading in done and not sending.done():
                problem = reading.result()
                if problem is None:
                    await sending  # the last results
                elif problem:
                    await refuse(socket, problem)
        finally:
            for task in (sending, reading):
                task.cancel()
            await asyncio.gather(sending, reading, return_exceptions=True)
            await socket.close()

    async def _listen(self, socket: web.WebSocketResponse, stream: ClientStream, rate: int) -> str | None:
        """Passes audio on until the client ends.

        Returns:
            None after a regular end, an empty text where the client has disconnected, else the error in its messages.
        """
        pcm, head = PcmStream(rate), b""
        while True:
            try:
                message = await socket.receive(timeout=self.config.idle_seconds)
            except TimeoutError:
                return f"nothing arrived for {self.config.idle_seconds:g} seconds"
            if message.type == WSMsgType.BINARY:
                if len(head) < HEADER_BYTES:
                    head += message.data
                    if len(head) >= HEADER_BYTES:
                        try:
                            refuse_other_than_pcm(head, "the stream")
                        except AudioError as error:
                            return str(error)
                await self.engine.add(stream, pcm.push(message.data))
            elif message.type == WSMsgType.TEXT:
                if not _is_finish(message.data):
                    return 'text messages must be {"type": "finish"}; audio is binary'
                await self.engine.add(stream, pcm.finish())
                self.engine.end(stream)
                return None
            else:
                return ""

    async def _answer(self, socket: web.WebSocketResponse, stream: ClientStream) -> None:
        """Sends results; of several that wait, the newest partial text only."""
        while True:
            results = await self.engine.results(stream)
            messages = [made for result in results for made in messages_of(result)]
            for number, values in enumerate(messages):
                if values["type"] == "final" or number == len(messages) - 1:
                    await send(socket, values)
            if results[-1].last:
                if stream.failure:
                    await refuse(socket, stream.failure)
                else:
                    await send(socket, {"type": "done"})
                return


def messages_of(result: StreamResult) -> list[dict[str, Any]]:
    """Returns the messages to a client for a result."""
    update, made = result.update, []
    if result.last:
        return []
    latency_ms = round(1e3 * result.latency, 1)
    if update.words:
        words = [word_values(word) for word in update.words]
        text = " ".join(word.text for word in update.words)
        made.append({"type": "final", "text": text, "words": words, "latency_ms": latency_ms})
    partial = {"text": update.text, "stable": update.stable, "seconds": round(update.seconds, 3)}
    return [*made, {"type": "partial", "latency_ms": latency_ms} | partial]


async def send(socket: web.WebSocketResponse, values: dict[str, Any]) -> None:
    """Sends a message; raises TimeoutError for a client that does not take it."""
    await asyncio.wait_for(socket.send_str(json.dumps(values, ensure_ascii=False)), SEND_SECONDS)


async def refuse(socket: web.WebSocketResponse, problem: str) -> None:
    """Sends a client an error message and closes its connection."""
    with contextlib.suppress(ConnectionError, RuntimeError, TimeoutError):
        await send(socket, {"type": "error", "error": problem})
        await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=problem.encode()[:120])


def _is_finish(text: str) -> bool:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("type") == "finish"


def read_token(config: ServeConfig) -> str:
    """Returns the token of `token_file`. Raises ConfigError where it cannot be read or is too short."""
    if not config.token_file:
        return ""
    try:
        token = Path(config.token_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={config.token_file}: cannot be read ({error})") from None
    if len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"token_file={config.token_file}: the token has {len(token)} characters; {LEAST_TOKEN} or more"
        )
    return token


def serve(config: ServeConfig, say: Callable[[str], None] = print) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        config: model, address and limits.
        say: receives one line with the address when the server answers.

    Raises:
        ConfigError: the checkpoint cannot stream, the token is unusable, or the address is taken.
    """
    token = read_token(config)
    recogniser = StreamingRecogniser(
        open_recogniser(config.checkpoint, config.head, config.device),
        config.decoding,
        config.chunk,
        config.left,
        max_minutes=config.max_minutes,
    )
    asyncio.run(_serve(config, Server(config, recogniser, token), say))


async def _serve(config: ServeConfig, server: Server, say: Callable[[str], None]) -> None:
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"host={config.host} port={config.port}: {error.strerror}; take another port, or port=0 for a free one"
            ) from None
        port = runner.addresses[0][1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        suffix = "?token=…" if server.token else ""
        say(f"http://{shown}:{port}/{suffix} (Ctrl-C ends it)")
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
    finally:
        await runner.cleanup()
