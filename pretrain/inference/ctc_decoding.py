"""CTC output to symbols: greedy, and prefix beam search with an n-gram of symbols (arXiv 1408.2873)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.interfaces.decoding import Candidate, Prefix
from pretrain.nn.text_targets import BLANK


def greedy(log_probs_FV: np.ndarray) -> list[int]:
    """Returns the symbols of the most probable path, repeats merged and blanks dropped.

    Args:
        log_probs_FV: ln p of blank (0) and symbol i (class i + 1) per frame, (F, V).
    """
    best = log_probs_FV.argmax(1)
    kept = [v for i, v in enumerate(best.tolist()) if v != BLANK and (i == 0 or v != best[i - 1])]
    return [v - 1 for v in kept]


class NGram:
    """N-gram model of symbols, interpolated with shorter contexts (Witten & Bell 1991).

    Args:
        sequences: training texts, as symbols 0 … size − 1.
        order: symbols of a context plus one.
        size: number of symbols.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], order: int, size: int) -> None:
        self.order, self.size = order, size
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for sequence in sequences:
            padded = (*self._start, *sequence)
            for end in range(order - 1, len(padded)):
                for length in range(order):
                    self._after[padded[end - length : end]][padded[end]] += 1

    @property
    def _start(self) -> tuple[int, ...]:
        return (-1,) * (self.order - 1)

    def log_prob(self, context: Sequence[int], symbol: int) -> float:
        """Returns ln p(symbol | the last `order` − 1 symbols of `context`)."""
        probability = 1.0 / self.size
        last = context[-(self.order - 1) :] if self.order > 1 else ()
        padded = (*self._start, *last)
        for length in range(self.order):
            counts = self._after.get(padded[len(padded) - length :])
            if counts:
                total, kinds = sum(counts.values()), len(counts)
                probability = (counts[symbol] + kinds * probability) / (total + kinds)
        return math.log(probability)


def common_beginning(prefixes: Iterable[Prefix]) -> Prefix:
    """Returns the longest beginning that all prefixes share."""
    prefixes = list(prefixes)
    first, last = min(prefixes), max(prefixes)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


class Beams(NamedTuple):
    """The prefixes that a prefix beam search keeps after some frames.

    paths: ln p of all paths that spell a prefix and end in a blank, and of those that end in its last symbol.
    extra: weight · ln p(prefix) + bonus · symbols.
    """

    paths: dict[Prefix, tuple[float, float]]
    extra: dict[Prefix, float]

    @classmethod
    def start(cls) -> Beams:
        """Returns the search before the first frame: the empty prefix."""
        return cls({(): (0.0, -math.inf)}, {(): 0.0})

    def log_prob(self, prefix: Prefix) -> float:
        """Returns ln p of all paths that spell a prefix, with `extra`."""
        return _add(*self.paths[prefix]) + self.extra[prefix]

    @property
    def best(self) -> Prefix:
        """The most probable prefix."""
        return max(self.paths, key=self.log_prob)

    @property
    def ranked(self) -> list[Candidate]:
        """All prefixes, the most probable first."""
        found = [Candidate(prefix, self.log_prob(prefix)) for prefix in self.paths]
        return sorted(found, key=lambda candidate: -candidate.log_prob)

    @property
    def common(self) -> Prefix:
        """The longest beginning that all prefixes share; later frames cannot change it."""
        return common_beginning(self.paths)


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a prefix beam search.

    Args:
        beam: prefixes that are kept.
        model: scores sequences of symbols.
        weight: of its ln p.
        bonus: per symbol, against the model's preference of short results.
        pruned_below: symbols with a smaller ln p are not tried.
    """

    beam: int
    model: NGram | None = None
    weight: float = 0.5
    bonus: float = 0.0
    pruned_below: float = -8.0

    def step(self, beams: Beams, log_probs_V: np.ndarray) -> Beams:
        """Returns the search after one more frame, with ln p of blank and symbols (V,)."""
        following: dict[Prefix, tuple[float, float]] = defaultdict(lambda: (-math.inf, -math.inf))
        tried = [v for v in np.flatnonzero(log_probs_V > self.pruned_below).tolist() if v != BLANK]
        extended: dict[Prefix, float] = {}
        for prefix, (blank, symbol_end) in beams.paths.items():
            total = _add(blank, symbol_end)
            was = following[prefix]
            following[prefix] = (_add(was[0], total + float(log_probs_V[BLANK])), was[1])
            extended[prefix] = beams.extra[prefix]
            for v in tried:
                symbol, p = v - 1, float(log_probs_V[v])
                longer = (*prefix, symbol)
                if longer not in extended:
                    gain = self.weight * self.model.log_prob(prefix, symbol) if self.model else 0.0
                    extended[longer] = beams.extra[prefix] + gain + self.bonus
                begin = total
                if prefix and prefix[-1] == symbol:
                    was = following[prefix]
                    following[prefix] = (was[0], _add(was[1], symbol_end + p))
                    begin = blank
                was = following[longer]
                following[longer] = (was[0], _add(was[1], begin + p))
        ranked = sorted(following, key=lambda prefix: -(_add(*following[prefix]) + extended[prefix]))[: self.beam]
        return Beams({prefix: following[prefix] for prefix in ranked}, {prefix: extended[prefix] for prefix in ranked})


def beam_search(
    log_probs_FV: np.ndarray,
    beam: int,
    model: NGram | None = None,
    weight: float = 0.5,
    bonus: float = 0.0,
    pruned_below: float = -8.0,
) -> list[int]:
    """Returns the symbols with the largest ln p over all their paths + weight · ln p(symbols) + bonus · their number.

    Args:
        log_probs_FV: ln p of blank (0) and symbol i (class i + 1) per frame, (F, V).
        beam, model, weight, bonus, pruned_below: as in BeamSearch.
    """
    search, beams = BeamSearch(beam, model, weight, bonus, pruned_below), Beams.start()
    for log_probs_V in log_probs_FV:
        beams = search.step(beams, log_probs_V)
    return list(beams.best)


def _add(a: float, b: float) -> float:
    """Returns ln(eᵃ + eᵇ)."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
