"""The largest micro-batch that fits in memory: bisection per length, then the cap that the plan understands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAP = 0.05
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Caps:
    """rows: (seconds of a segment, most rows that fit), longest first. The others: see ReaderConfig."""

    rows: Sequence[tuple[float, int]]
    cap_seconds: float
    cap_quadratic: float


def most_rows(fits: Callable[[int], bool], start: int) -> int:
    """The most rows for which `fits`, to within 5 % (never too many): doubling or halving, then bisection. 0: none."""
    good, bad, rows = 0, 0, max(1, start)
    while not (good and bad) and good < MOST_ROWS:
        if fits(rows):
            good, rows = rows, rows * 2
        else:
            bad, rows = rows, rows // 2
            if rows == 0:
                return 0
    while bad and bad - good > max(1, GAP * bad):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def find_caps(fits: Callable[[int, float], bool], lengths: Sequence[float], start_seconds: float) -> Caps:
    """Bisects at each of `lengths` (seconds), longest first. `fits(rows, seconds)` runs a step on the real model.

    Raises ValueError if not even one segment of the longest length fits.
    """
    rows: list[tuple[float, int]] = []
    budget = start_seconds
    for seconds in sorted(lengths, reverse=True):
        found = most_rows(lambda n, seconds=seconds: fits(n, seconds), int(budget / seconds))  # type: ignore[misc]
        if not found:
            raise ValueError(f"not even one segment of {seconds:g} s fits in memory; lower data.max_seconds")
        rows.append((seconds, found))
        budget = found * seconds
    return Caps(rows, *_cap_of(rows))


def _cap_of(rows: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """cap and q with n * s * (1 + q * s) <= cap at every measured (s, n): q from the outer lengths, cap the least."""
    (long, n_long), (short, n_short) = rows[0], rows[-1]
    a, b = n_long * long, n_short * short
    quadratic = max(0.0, (b - a) / (a * long - b * short)) if a * long > b * short else 0.0
    return min(n * s * (1 + quadratic * s) for s, n in rows), quadratic
