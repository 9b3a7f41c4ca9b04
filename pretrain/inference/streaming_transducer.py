"""Decodes a transducer's output frame by frame: greedily, or by a beam search over all paths of a text.

In the search, hypotheses with equal tokens are one, whose probability is the sum over their paths (Graves, arXiv
1211.3711, section 3.2, breadth first: all hypotheses end a frame before the next one begins, as in ESPnet's
time-synchronous decoding). The times of tokens are those of a hypothesis' most probable path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from pretrain.inference.ctc_decoding import common_beginning
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
from pretrain.interfaces.models import Joiner
from pretrain.nn.text_targets import BLANK

MOST_PER_FRAME = 10
"""Tokens that a frame may have, against loops of an untrained predictor; as in NeMo."""


class Hypothesis(NamedTuple):
    """Tokens of a segment so far.

    log_prob: ln p of all paths that were kept.  path: ln p of the most probable of them.
    places: its frame of each token, counted from the segment's first.  scores: ln p of each token on it.
    """

    tokens: Prefix = ()
    log_prob: float = 0.0
    path: float = 0.0
    places: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    def blank(self, log_p: float) -> Hypothesis:
        """Returns it after a blank, which ends the frame."""
        return self._replace(log_prob=self.log_prob + log_p, path=self.path + log_p)

    def token(self, token: int, log_p: float, place: int) -> Hypothesis:
        """Returns it with a further token at frame `place`."""
        tokens, places, scores = (*self.tokens, token), (*self.places, place), (*self.scores, log_p)
        return Hypothesis(tokens, self.log_prob + log_p, self.path + log_p, places, scores)

    def joined(self, other: Hypothesis) -> Hypothesis:
        """Returns the hypothesis of two sets of paths with the same tokens."""
        likelier = self if self.path >= other.path else other
        return likelier._replace(log_prob=float(np.logaddexp(self.log_prob, other.log_prob)))


class TransducerState(NamedTuple):
    """State of one stream's decoder.

    first: the first frame of the current segment, counted from the stream's start.  n_frames: its frames so far.
    silent: frames without a token at its end.
    before: the last tokens before it that the predictor reads.
    hypotheses: of its tokens, the most probable first.
    """

    first: int = 0
    n_frames: int = 0
    silent: int = 0
    before: Prefix = ()
    hypotheses: tuple[Hypothesis, ...] = (Hypothesis(),)

    @property
    def symbols(self) -> Prefix:
        """The tokens of the segment so far."""
        return self.hypotheses[0].tokens

    @property
    def stable(self) -> Prefix:
        """The beginning of `symbols` that later frames cannot change."""
        return common_beginning(hypothesis.tokens for hypothesis in self.hypotheses)

    @property
    def bytes(self) -> int:
        """Size of the hypotheses' numbers, 8 bytes each."""
        return 8 * sum(2 + 3 * len(hypothesis.tokens) for hypothesis in self.hypotheses)


class TransducerSegment(NamedTuple):
    """A part of a stream that has ended: frames `first` … `first + n_frames − 1`, and what it may say."""

    first: int
    n_frames: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def candidates(self) -> list[Candidate]:
        """The hypotheses, the most probable first."""
        return [Candidate(hypothesis.tokens, hypothesis.log_prob) for hypothesis in self.hypotheses]

    def align(self, symbols: Prefix) -> list[AlignedSymbol]:
        """Returns the frame at which each token was emitted."""
        found = next(hypothesis for hypothesis in self.hypotheses if hypothesis.tokens == symbols)
        return [AlignedSymbol(place, place + 1, score) for place, score in zip(found.places, found.scores, strict=True)]


@dataclass(frozen=True)
class TransducerDecoder(StreamingDecoder[TransducerState]):
    """Decodes a transducer's frames of streams, (J,) as its joiner reads them.

    Args:
        rate_hz: frames per second.
        joiner: of the transducer.
        device: torch device of its weights.
        spaces: tokens that are nothing but a space, which do not interrupt silence.
        beam: hypotheses that are kept; 0: greedy.
        end_points: when segments end.
        most_per_frame: tokens that a frame may have.
    """

    rate_hz: float
    joiner: Joiner
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spaces: frozenset[int] = frozenset()
    beam: int = 0
    end_points: EndPoints = DEFAULT_END_POINTS
    most_per_frame: int = MOST_PER_FRAME

    def start(self, first: int = 0) -> TransducerState:
        return TransducerState(first)

    def finish(self, state: TransducerState) -> list[DecodedSegment]:
        return [TransducerSegment(state.first, state.n_frames, state.hypotheses)] if state.symbols else []

    def step(self, state: TransducerState, frame: np.ndarray) -> TransducerState:
        search = self._searched if self.beam else self._greedy
        found, n_frames = search(state, frame), state.n_frames + 1
        spoken = self._spoken(found[0])
        silent = n_frames - 1 - spoken[-1] if spoken else n_frames
        return state._replace(n_frames=n_frames, silent=silent, hypotheses=tuple(found))

    def cut(self, state: TransducerState) -> tuple[TransducerState, list[DecodedSegment]]:
        """Ends a segment in the longest pause of its best hypothesis, which alone goes on."""
        best = state.hypotheses[0]
        silent_F = np.ones(state.n_frames, bool)
        silent_F[self._spoken(best)] = False
        cut = longest_pause(silent_F)
        n = sum(place < cut for place in best.places)
        ended = best._replace(tokens=best.tokens[:n], places=best.places[:n], scores=best.scores[:n])
        later = tuple(place - cut for place in best.places[n:])
        rest = Hypothesis(best.tokens[n:], places=later, scores=best.scores[n:])
        n_frames = state.n_frames - cut
        before = (*state.before, *ended.tokens)[-self.joiner.context :]
        after = TransducerState(state.first + cut, n_frames, 0, before, (rest,))
        return after, [TransducerSegment(state.first, cut, (ended,))] if ended.tokens else []

    def _spoken(self, hypothesis: Hypothesis) -> list[int]:
        """Returns the frames of its tokens, without spaces."""
        pairs = zip(hypothesis.tokens, hypothesis.places, strict=True)
        return [place for token, place in pairs if token not in self.spaces]

    def _log_probs(self, state: TransducerState, frame: np.ndarray, prefixes: Sequence[Prefix]) -> np.ndarray:
        """Returns ln p of the next class after each prefix, (N, V) fp64."""
        context, read = self.joiner.context, []
        for prefix in prefixes:
            last = [token + 1 for token in (*state.before, *prefix)[-context:]]
            read.append([BLANK] * (context - len(last)) + last)
        with torch.inference_mode():
            token_NJ = self.joiner.predict(torch.tensor(read, device=self.device))
            frame_1J = torch.from_numpy(frame).to(self.device)[None]
            logits_NV = self.joiner.join(frame_1J, token_NJ)
            found: np.ndarray = logits_NV.double().log_softmax(-1).cpu().numpy()
        return found

    def _greedy(self, state: TransducerState, frame: np.ndarray) -> list[Hypothesis]:
        """Appends the likeliest class until it is the blank."""
        found = state.hypotheses[0]
        for number in range(self.most_per_frame + 1):
            log_p_V = self._log_probs(state, frame, [found.tokens])[0]
            best = BLANK if number == self.most_per_frame else int(log_p_V.argmax())
            if best == BLANK:
                break
            found = found.token(best - 1, float(log_p_V[best]), state.n_frames)
        return [found.blank(float(log_p_V[BLANK]))]

    def _searched(self, state: TransducerState, frame: np.ndarray) -> list[Hypothesis]:
        """Extends all hypotheses by 0, 1, 2 … tokens at this frame and keeps the most probable ones."""
        going, ended = list(state.hypotheses), dict[Prefix, Hypothesis]()
        for number in range(self.most_per_frame + 1):
            log_p_NV = self._log_probs(state, frame, [hypothesis.tokens for hypothesis in going])
            for hypothesis, log_p_V in zip(going, log_p_NV, strict=True):
                done = hypothesis.blank(float(log_p_V[BLANK]))
                other = ended.get(done.tokens)
                ended[done.tokens] = done if other is None else done.joined(other)
            if number == self.most_per_frame:
                break
            total_NV = np.array([hypothesis.log_prob for hypothesis in going])[:, None] + log_p_NV[:, 1:]
            kept = np.argsort(-total_NV, axis=None, kind="stable")[: self.beam]
            floor = self._floor(ended)
            going = [
                going[row].token(token, float(log_p_NV[row, token + 1]), state.n_frames)
                for row, token in (divmod(int(place), total_NV.shape[1]) for place in kept)
                if total_NV[row, token] > floor
            ]
            if not going:
                break
        return sorted(ended.values(), key=lambda hypothesis: -hypothesis.log_prob)[: self.beam]

    def _floor(self, ended: dict[Prefix, Hypothesis]) -> float:
        """Returns ln p below which a hypothesis cannot be kept any more; longer ones have a smaller ln p."""
        ranked = sorted((hypothesis.log_prob for hypothesis in ended.values()), reverse=True)
        return ranked[self.beam - 1] if len(ranked) >= self.beam else -math.inf
