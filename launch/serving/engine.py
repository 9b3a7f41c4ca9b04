"""Computes the streams of all clients in one batch per turn, in one thread beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.recognition.streaming_recogniser import (
    RecognitionState,
    StreamingRecogniser,
    Update,
    join_recognitions,
    split_recognitions,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamResult:
    """An update of one stream, and the seconds from the arrival of its last sample to the result."""

    update: Update
    latency: float
    last: bool = False


@dataclass(eq=False)
class ClientStream:
    """One client's stream.

    waiting: audio that has arrived and not been computed, with the time of arrival of each part.
    ended: whether the client has sent all audio.  failure: the reason why the stream cannot continue.
    """

    state: RecognitionState
    limit: int
    waiting: deque[tuple[np.ndarray, float]] = field(default_factory=deque)
    samples: int = 0
    ended: bool = False
    failure: str = ""
    results: asyncio.Queue[StreamResult] = field(default_factory=asyncio.Queue)
    has_space: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, most: int) -> tuple[np.ndarray, float]:
        """Removes at most `most` samples; returns them, and the time at which the last of them arrived."""
        parts, arrived, missing = [], time.monotonic(), most
        while self.waiting and missing:
            part, arrived = self.waiting.popleft()
            if len(part) > missing:
                self.waiting.appendleft((part[missing:], arrived))
                part = part[:missing]
            parts.append(part)
            missing -= len(part)
        self.samples -= most - missing
        if self.samples < self.limit:
            self.has_space.set()
        return np.concatenate(parts) if parts else np.zeros(0, np.float32), arrived


class StreamingEngine:
    """Computes all streams that have audio, in turns of at most one chunk of each.

    The audio of a client that sends faster than real time waits in its own queue and delays no other client.

    Args:
        recogniser: model and decoder.
        queue_seconds: audio that may wait per stream.
        queue_results: results that may wait per stream; its computation pauses until they are fetched.
    """

    def __init__(self, recogniser: StreamingRecogniser, queue_seconds: float, queue_results: int) -> None:
        self.recogniser, self.queue_results = recogniser, queue_results
        self.limit = round(queue_seconds * SAMPLE_RATE)
        self.most = recogniser.chunk_samples
        self.streams: set[ClientStream] = set()
        self._wake = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, "streams")

    def open_stream(self) -> ClientStream:
        """Begins a stream."""
        stream = ClientStream(self.recogniser.start(), self.limit)
        self.streams.add(stream)
        return stream

    def close(self, stream: ClientStream) -> None:
        """Removes a stream; its remaining audio is not computed."""
        self.streams.discard(stream)

    async def add(self, stream: ClientStream, wave_T: np.ndarray) -> None:
        """Appends audio; waits while the stream's queue is full."""
        if not len(wave_T):
            return  # empty messages must not fill the queue, whose limit is a number of samples
        while stream.samples >= stream.limit and not stream.failure:
            stream.has_space.clear()
            await stream.has_space.wait()
        stream.waiting.append((wave_T, time.monotonic()))
        stream.samples += len(wave_T)
        self._wake.set()

    def end(self, stream: ClientStream) -> None:
        """Marks the end of a stream's audio; its last result follows."""
        stream.ended = True
        self._wake.set()

    async def run(self) -> None:
        """Computes until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                ready = [stream for stream in self.streams if self._ready(stream)]
                if not ready:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                taken = [stream.take(self.most) for stream in ready]
                finishing = [stream.ended and not stream.samples for stream in ready]
                parts, arrivals = [part for part, _ in taken], [arrived for _, arrived in taken]
                made = await loop.run_in_executor(
                    self._pool, self._turn, [stream.state for stream in ready], parts, finishing
                )
                for stream, found, arrived, last in zip(ready, made, arrivals, finishing, strict=True):
                    stream.state, stream.failure = found.state, found.failure
                    for update in found.updates:
                        stream.results.put_nowait(StreamResult(update, time.monotonic() - arrived))
                    if last or found.failure:
                        self.close(stream)
                        stream.has_space.set()
                        stream.results.put_nowait(StreamResult(_nothing(), 0.0, last=True))
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ready(self, stream: ClientStream) -> bool:
        accepts = not stream.failure and stream.results.qsize() < self.queue_results
        return accepts and (stream.samples >= self.most or stream.ended)

    async def results(self, stream: ClientStream) -> list[StreamResult]:
        """Waits for results of a stream and takes all that there are."""
        found = [await stream.results.get()]
        while not stream.results.empty():
            found.append(stream.results.get_nowait())
        self._wake.set()
        return found

    def _turn(
        self, states: Sequence[RecognitionState], parts: Sequence[np.ndarray], finishing: Sequence[bool]
    ) -> list[_Turned]:
        """Computes all streams together; where that fails, each alone, so that one stream cannot stop another."""
        try:
            return self._computed(states, parts, finishing)
        except Exception as error:
            if len(states) == 1:
                if isinstance(error, ConfigError):
                    return [_Turned(states[0], self.recogniser.break_off(states[0]), str(error))]
                logger.exception("a stream failed")
                return [_Turned(states[0], [], "internal error; the server's log has it")]
        alone = zip(states, parts, finishing, strict=True)
        return [self._turn([state], [part], [last])[0] for state, part, last in alone]

    def _computed(
        self, states: Sequence[RecognitionState], parts: Sequence[np.ndarray], finishing: Sequence[bool]
    ) -> list[_Turned]:
        waves = [torch.from_numpy(part) for part in parts]
        joint, updates = self.recogniser.push(join_recognitions(states), waves)
        made = [_Turned(state, [update]) for state, update in zip(split_recognitions(joint), updates, strict=True)]
        ends = [row for row, last in enumerate(finishing) if last]
        if ends:
            joint, updates = self.recogniser.finish(join_recognitions([made[row].state for row in ends]))
            for row, state, update in zip(ends, split_recognitions(joint), updates, strict=True):
                made[row] = _Turned(state, [*made[row].updates, update])
        return made


class _Turned(NamedTuple):
    """A stream after a turn. failure: the reason why it cannot continue; empty: it can."""

    state: RecognitionState
    updates: list[Update]
    failure: str = ""


def _nothing() -> Update:
    return Update((), "", "", 0.0, False)
