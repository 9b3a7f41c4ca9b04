"""Loss scaling for fp16, in which small gradients underflow (Micikevicius et al. 2018, arXiv 1710.03740, §3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST, LARGEST = 2.0**16, 2.0**24
GROW_EVERY = 2_000
"""Updates without an overflow after which a larger scale is tried."""


class LossScale:
    """The factor on the loss: a power of two, so that gradients in range stay exact.

    An update whose gradients overflow is recomputed at half the scale instead of being skipped: masks and dropout are
    keyed by the step, so it is the same update on every rank and engine.
    """

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = FIRST if self.dynamic else 1.0
        self._good = 0

    def lower(self) -> bool:
        """Halves the scale after an overflow; returns whether the update can be recomputed."""
        self._good = 0
        if self.value <= 1.0:
            return False
        self.value /= 2.0
        return True

    def fitted(self) -> None:
        """Counts an update without overflow; doubles the scale after GROW_EVERY of them in a row."""
        self._good += 1
        if self.dynamic and self._good >= GROW_EVERY:
            self._good, self.value = 0, min(2.0 * self.value, LARGEST)

    def state(self) -> dict[str, Any]:
        """Returns the state for a resume, as plain JSON."""
        return {"value": self.value, "good": self._good} if self.dynamic else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Loads a `state`; one saved in another precision is ignored."""
        if self.dynamic and state:
            self.value, self._good = float(state["value"]), int(state["good"])
