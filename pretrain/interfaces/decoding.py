"""Interface of decoders of streams: symbols so far, their stable part, and segments that end at pauses.

State in, state out, like the encoder's. Everything depends on the frames alone, never on how they arrive. The state is
bounded: a segment is ended after `EndPoints.longest_seconds`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

Prefix = tuple[int, ...]
"""Symbols from the start of a segment on."""


class Candidate(NamedTuple):
    """Symbols that speech may have, and ln p of all their paths that a search has kept."""

    symbols: Prefix
    log_prob: float


class AlignedSymbol(NamedTuple):
    """Frames of one symbol on the best path: `start` … `stop` − 1. log_prob: mean ln p of the symbol over them."""

    start: int
    stop: int
    log_prob: float


@dataclass(frozen=True)
class EndPoints:
    """When a segment ends, in seconds (the rules and values of sherpa-onnx's recogniser).

    silence_seconds: nothing but silence.  after_words_seconds: silence after symbols.  longest_seconds: at the latest,
    in the longest pause of the segment's second half.
    """

    silence_seconds: float = 2.4
    after_words_seconds: float = 1.2
    longest_seconds: float = 20.0


DEFAULT_END_POINTS = EndPoints()


class DecodedSegment(Protocol):
    """A part of a stream that has ended."""

    @property
    def first(self) -> int:
        """Its first frame, counted from the stream's start."""

    @property
    def n_frames(self) -> int:
        """Number of its frames."""

    @property
    def candidates(self) -> list[Candidate]:
        """Candidate texts, the most probable first."""

    def align(self, symbols: Prefix) -> list[AlignedSymbol]:
        """Returns the frames of each symbol of a candidate, counted from `first`."""


class StreamDecoderState(Protocol):
    """State of one stream's decoder: the current segment."""

    @property
    def first(self) -> int:
        """Its first frame, counted from the stream's start."""

    @property
    def n_frames(self) -> int:
        """Number of its frames so far."""

    @property
    def silent(self) -> int:
        """Number of frames without a symbol at its end; spaces are none."""

    @property
    def symbols(self) -> Prefix:
        """Its symbols so far."""

    @property
    def stable(self) -> Prefix:
        """The beginning of `symbols` that later frames cannot change."""

    @property
    def bytes(self) -> int:
        """Size of its numbers in bytes."""


State = TypeVar("State", bound=StreamDecoderState)


class StreamingDecoder(abc.ABC, Generic[State]):
    """Decodes streams; keeps no state.

    rate_hz: frames per second.  end_points: when segments end.
    """

    rate_hz: float
    end_points: EndPoints

    @abc.abstractmethod
    def start(self, first: int = 0) -> State:
        """Returns the state before a segment that begins at frame `first`."""

    @abc.abstractmethod
    def finish(self, state: State) -> list[DecodedSegment]:
        """Returns the segment of a state, if it has symbols."""

    @abc.abstractmethod
    def step(self, state: State, frame: np.ndarray) -> State:
        """Decodes one more frame of the segment."""

    @abc.abstractmethod
    def cut(self, state: State) -> tuple[State, list[DecodedSegment]]:
        """Ends a segment in its longest pause; returns the state of the next one, which has the frames after it."""

    def push(self, state: State, frames: np.ndarray) -> tuple[State, list[DecodedSegment]]:
        """Decodes further frames, (F, …); returns the new state and the segments with symbols that have ended."""
        ended: list[DecodedSegment] = []
        for frame in frames:
            state = self.step(state, frame)
            if state.n_frames >= self.end_points.longest_seconds * self.rate_hz:
                state, segments = self.cut(state)
                ended += segments
            elif self._paused(state):
                ended += self.finish(state)
                state = self.start(state.first + state.n_frames)
        return state, ended

    def _paused(self, state: State) -> bool:
        rules = self.end_points
        seconds = rules.after_words_seconds if state.symbols else rules.silence_seconds
        return state.silent >= seconds * self.rate_hz
