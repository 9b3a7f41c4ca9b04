"""Arithmetic on integers."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive integer, sorted."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
