"""CTC output to text: greedy, and prefix beam search with a character n-gram (arXiv 1408.2873)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

BLANK = 0


def greedy(log_probs_FV: np.ndarray, symbols: str) -> str:
    """Returns the text of the most probable path, repeats merged and blanks dropped.

    Args:
        log_probs_FV: ln p of blank (0) and symbols (i + 1 is `symbols[i]`) per frame, (F, V).
        symbols: the characters.
    """
    best = log_probs_FV.argmax(1)
    kept = [v for i, v in enumerate(best) if v != BLANK and (i == 0 or v != best[i - 1])]
    return "".join(symbols[v - 1] for v in kept)


class NGram:
    """Character n-gram model, interpolated with shorter contexts (Witten & Bell 1991)."""

    def __init__(self, texts: Sequence[str], order: int, symbols: str) -> None:
        self.order, self.symbols = order, symbols
        self._after: dict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            padded = "^" * (order - 1) + text
            for end in range(order - 1, len(padded)):
                for length in range(order):
                    self._after[padded[end - length : end]][padded[end]] += 1

    def log_prob(self, context: str, symbol: str) -> float:
        """Returns ln p(symbol | the last `order` − 1 characters of `context`)."""
        probability = 1.0 / len(self.symbols)
        padded = "^" * (self.order - 1) + context
        for length in range(self.order):
            counts = self._after.get(padded[len(padded) - length :])
            if counts:
                total, kinds = sum(counts.values()), len(counts)
                probability = (counts[symbol] + kinds * probability) / (total + kinds)
        return math.log(probability)


def beam_search(
    log_probs_FV: np.ndarray, symbols: str, beam: int, model: NGram | None = None, weight: float = 0.5,
    bonus: float = 0.0, pruned_below: float = -8.0,
) -> str:  # fmt: skip
    """Returns the text with the largest ln p over all its paths + weight · ln p(text) + bonus · characters.

    Frame by frame, prefixes keep the probability of ending in a blank and of ending in their last symbol; symbols with
    ln p < pruned_below are not tried.
    """
    beams: dict[str, tuple[float, float]] = {"": (0.0, -math.inf)}
    extra: dict[str, float] = {"": 0.0}
    for log_probs_V in log_probs_FV:
        following: dict[str, tuple[float, float]] = defaultdict(lambda: (-math.inf, -math.inf))
        tried = [v for v in np.flatnonzero(log_probs_V > pruned_below).tolist() if v != BLANK]
        for prefix, (blank, symbol_end) in beams.items():
            total = _add(blank, symbol_end)
            was = following[prefix]
            following[prefix] = (_add(was[0], total + float(log_probs_V[BLANK])), was[1])
            for v in tried:
                symbol, p = symbols[v - 1], float(log_probs_V[v])
                longer = prefix + symbol
                if longer not in extra:
                    gain = weight * model.log_prob(prefix, symbol) if model else 0.0
                    extra[longer] = extra[prefix] + gain + bonus
                if prefix.endswith(symbol):
                    was = following[prefix]
                    following[prefix] = (was[0], _add(was[1], symbol_end + p))
                    begin = blank
                else:
                    begin = total
                was = following[longer]
                following[longer] = (was[0], _add(was[1], begin + p))
        ranked = sorted(following, key=lambda prefix: -(_add(*following[prefix]) + extra[prefix]))
        beams = {prefix: following[prefix] for prefix in ranked[:beam]}
    return max(beams, key=lambda prefix: _add(*beams[prefix]) + extra[prefix])


def _add(a: float, b: float) -> float:
    """Returns ln(eᵃ + eᵇ)."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
