"""CTC output to symbols: greedy, and prefix beam search with an n-gram of symbols (arXiv 1408.2873)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

BLANK = 0


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
        sequences: what the model is fitted on: symbols 0 … size − 1.
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


def beam_search(
    log_probs_FV: np.ndarray, beam: int, model: NGram | None = None, weight: float = 0.5, bonus: float = 0.0,
    pruned_below: float = -8.0,
) -> list[int]:  # fmt: skip
    """Returns the symbols with the largest ln p over all their paths + weight · ln p(symbols) + bonus · their number.

    Frame by frame, prefixes keep the probability of ending in a blank and of ending in their last symbol; symbols with
    ln p < pruned_below are not tried.

    Args:
        log_probs_FV: ln p of blank (0) and symbol i (class i + 1) per frame, (F, V).
        beam: prefixes that are kept.
        model: scores sequences of symbols.
        weight: of its ln p.
        bonus: per symbol, against the model's preference of short results.
        pruned_below: ln p.
    """
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    extra: dict[tuple[int, ...], float] = {(): 0.0}
    for log_probs_V in log_probs_FV:
        following: dict[tuple[int, ...], tuple[float, float]] = defaultdict(lambda: (-math.inf, -math.inf))
        tried = [v for v in np.flatnonzero(log_probs_V > pruned_below).tolist() if v != BLANK]
        extended: dict[tuple[int, ...], float] = {}
        for prefix, (blank, symbol_end) in beams.items():
            total = _add(blank, symbol_end)
            was = following[prefix]
            following[prefix] = (_add(was[0], total + float(log_probs_V[BLANK])), was[1])
            extended[prefix] = extra[prefix]
            for v in tried:
                symbol, p = v - 1, float(log_probs_V[v])
                longer = (*prefix, symbol)
                if longer not in extended:
                    gain = weight * model.log_prob(prefix, symbol) if model else 0.0
                    extended[longer] = extra[prefix] + gain + bonus
                begin = total
                if prefix and prefix[-1] == symbol:
                    was = following[prefix]
                    following[prefix] = (was[0], _add(was[1], symbol_end + p))
                    begin = blank
                was = following[longer]
                following[longer] = (was[0], _add(was[1], begin + p))
        ranked = sorted(following, key=lambda prefix: -(_add(*following[prefix]) + extended[prefix]))
        beams = {prefix: following[prefix] for prefix in ranked[:beam]}
        extra = {prefix: extended[prefix] for prefix in beams}
    best: tuple[int, ...] = max(beams, key=lambda prefix: _add(*beams[prefix]) + extra[prefix])
    return list(best)


def _add(a: float, b: float) -> float:
    """Returns ln(eᵃ + eᵇ)."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
