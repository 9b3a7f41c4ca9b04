"""Decodes CTC output of a stream frame by frame: symbols so far, their stable part, and segments that end at pauses.

State in, state out, like the encoder's. Everything depends on the frames alone, never on how they arrive. The state is
bounded: a segment is ended after `EndPoints.longest_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.inference.ctc_decoding import Beams, BeamSearch, Prefix
from pretrain.inference.windows import longest_pause
from pretrain.nn.text_targets import BLANK


@dataclass(frozen=True)
class EndPoints:
    """When a segment ends, in seconds (the rules and values of sherpa-onnx's recogniser).

    silence_seconds: nothing but silence.  after_words_seconds: silence after symbols.  longest_seconds: at the latest,
    in the longest pause of the segment's second half.
    """

    silence_seconds: float = 2.4
    after_words_seconds: float = 1.2
    longest_seconds: float = 20.0


class DecoderState(NamedTuple):
    """State of one stream's decoder.

    first: the first frame of the current segment, counted from the stream's start.
    frames: ln p of the segment's frames, (V,) each.
    silent: frames without a symbol at its end.
    greedy: symbols of the most probable path.  last: class of its last frame.
    beams: the prefix beam search, or None.
    """

    first: int = 0
    frames: tuple[np.ndarray, ...] = ()
    silent: int = 0
    greedy: Prefix = ()
    last: int = BLANK
    beams: Beams | None = None

    @property
    def symbols(self) -> Prefix:
        """The symbols of the segment so far."""
        return self.greedy if self.beams is None else self.beams.best

    @property
    def stable(self) -> Prefix:
        """The beginning of `symbols` that later frames cannot change."""
        return self.greedy if self.beams is None else self.beams.common


class Segment(NamedTuple):
    """Symbols of a part of a stream that has ended, and ln p of its frames, (F, V), from frame `first` on."""

    first: int
    log_probs_FV: np.ndarray
    symbols: Prefix


@dataclass(frozen=True)
class StreamingDecoder:
    """Decodes CTC output of streams.

    Args:
        rate_hz: frames per second.
        silent: (F, V) ln p to (F,) bool: frames without a symbol, or with a space.
        search: prefix beam search; None: greedy.
        end_points: when segments end.
    """

    rate_hz: float
    silent: Callable[[np.ndarray], np.ndarray]
    search: BeamSearch | None = None
    end_points: EndPoints = EndPoints()

    def start(self, first: int = 0) -> DecoderState:
        """Returns the state before a segment that begins at frame `first`."""
        return DecoderState(first, beams=None if self.search is None else Beams.start())

    def push(self, state: DecoderState, log_probs_FV: np.ndarray) -> tuple[DecoderState, list[Segment]]:
        """Decodes further frames, (F, V); returns the new state and the segments with symbols that have ended."""
        ended: list[Segment] = []
        for log_probs_V, silent in zip(log_probs_FV, self.silent(log_probs_FV), strict=True):
            state = self._step(state, log_probs_V, bool(silent))
            if len(state.frames) >= self.end_points.longest_seconds * self.rate_hz:
                state, segment = self._cut(state)
                ended += segment
            elif self._paused(state):
                ended += self.finish(state)
                state = self.start(state.first + len(state.frames))
        return state, ended

    def finish(self, state: DecoderState) -> list[Segment]:
        """Returns the segment of a state, if it has symbols."""
        return [Segment(state.first, np.stack(state.frames), state.symbols)] if state.symbols else []

    def _step(self, state: DecoderState, log_probs_V: np.ndarray, silent: bool) -> DecoderState:
        best = int(log_probs_V.argmax())
        new = best not in (BLANK, state.last)
        return state._replace(
            frames=(*state.frames, log_probs_V),
            silent=state.silent + 1 if silent else 0,
            greedy=(*state.greedy, best - 1) if new else state.greedy,
            last=best,
            beams=None if self.search is None or state.beams is None else self.search.step(state.beams, log_probs_V),
        )

    def _paused(self, state: DecoderState) -> bool:
        rules = self.end_points
        seconds = rules.after_words_seconds if state.symbols else rules.silence_seconds
        return state.silent >= seconds * self.rate_hz

    def _cut(self, state: DecoderState) -> tuple[DecoderState, list[Segment]]:
        """Ends a segment in its longest pause; the frames after it begin the next one."""
        frames_FV = np.stack(state.frames)
        silent_F = self.silent(frames_FV)
        cut = longest_pause(silent_F)
        before, after = self.start(state.first), self.start(state.first + cut)
        for log_probs_V, silent in zip(frames_FV[:cut], silent_F[:cut], strict=True):
            before = self._step(before, log_probs_V, bool(silent))
        for log_probs_V, silent in zip(frames_FV[cut:], silent_F[cut:], strict=True):
            after = self._step(after, log_probs_V, bool(silent))
        return after, self.finish(before)
