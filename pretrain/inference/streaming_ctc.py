"""Decodes CTC output of a stream frame by frame, greedily or by prefix beam search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.inference.ctc_alignment import align
from pretrain.inference.ctc_decoding import Beams, BeamSearch
from pretrain.inference.windows import longest_pause
from pretrain.interfaces.decoding import (
    DEFAULT_END_POINTS,
    AlignedSymbol,
    Candidate,
    DecodedSegment,
    EndPoints,
    Prefix,
    StreamingDecoder,
)
from pretrain.nn.text_targets import BLANK


def silent_frames(symbols: tuple[str, ...], log_probs_FV: np.ndarray) -> np.ndarray:
    """Returns which frames of CTC output most probably hold a blank or a space, (F,) bool."""
    classes = [BLANK, *(number + 1 for number, symbol in enumerate(symbols) if symbol == " ")]
    return np.isin(log_probs_FV.argmax(1), classes)


class CTCState(NamedTuple):
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
    def n_frames(self) -> int:
        """Number of the segment's frames so far."""
        return len(self.frames)

    @property
    def symbols(self) -> Prefix:
        """The symbols of the segment so far."""
        return self.greedy if self.beams is None else self.beams.best

    @property
    def stable(self) -> Prefix:
        """The beginning of `symbols` that later frames cannot change."""
        return self.greedy if self.beams is None else self.beams.common

    @property
    def bytes(self) -> int:
        """Size of the frames in bytes."""
        return sum(frame_V.nbytes for frame_V in self.frames)


class CTCSegment(NamedTuple):
    """A part of a stream that has ended: ln p of its frames, (F, V), from frame `first` on, and what it may say."""

    first: int
    log_probs_FV: np.ndarray
    candidates: list[Candidate]

    @property
    def n_frames(self) -> int:
        """Number of its frames."""
        return len(self.log_probs_FV)

    @property
    def symbols(self) -> Prefix:
        """The most probable symbols."""
        return self.candidates[0].symbols

    def align(self, symbols: Prefix) -> list[AlignedSymbol]:
        """Returns the frames of each symbol by Viterbi alignment."""
        return align(self.log_probs_FV, symbols)


@dataclass(frozen=True)
class CTCDecoder(StreamingDecoder[CTCState]):
    """Decodes CTC output of streams: frames of ln p, (V,).

    Args:
        rate_hz: frames per second.
        silent: (F, V) ln p to (F,) bool: frames without a symbol, or with a space.
        search: prefix beam search; None: greedy.
        end_points: when segments end.
    """

    rate_hz: float
    silent: Callable[[np.ndarray], np.ndarray]
    search: BeamSearch | None = None
    end_points: EndPoints = DEFAULT_END_POINTS

    def start(self, first: int = 0) -> CTCState:
        return CTCState(first, beams=None if self.search is None else Beams.start())

    def finish(self, state: CTCState) -> list[DecodedSegment]:
        if not state.symbols:
            return []
        frames_FV = np.stack(state.frames)
        path = Candidate(state.greedy, float(frames_FV.max(1).sum()))
        return [CTCSegment(state.first, frames_FV, [path] if state.beams is None else state.beams.ranked)]

    def step(self, state: CTCState, frame: np.ndarray) -> CTCState:
        best = int(frame.argmax())
        new = best not in (BLANK, state.last)
        return state._replace(
            frames=(*state.frames, frame),
            silent=state.silent + 1 if self.silent(frame[None])[0] else 0,
            greedy=(*state.greedy, best - 1) if new else state.greedy,
            last=best,
            beams=None if self.search is None or state.beams is None else self.search.step(state.beams, frame),
        )

    def cut(self, state: CTCState) -> tuple[CTCState, list[DecodedSegment]]:
        cut = longest_pause(self.silent(np.stack(state.frames)))
        before, after = self.start(state.first), self.start(state.first + cut)
        for frame in state.frames[:cut]:
            before = self.step(before, frame)
        for frame in state.frames[cut:]:
            after = self.step(after, frame)
        return after, self.finish(before)
