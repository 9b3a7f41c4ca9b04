"""Loss scaling for fp16, whose smallest gradients would be zero (Micikevicius et al. 2018, arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST, LARGEST = 2.0**16, 2.0**24
GROW_EVERY = 2_000
"""Updates without an overflow after which a larger scale is tried."""


class LossScale:
    """The factor on the loss, always a power of two, so that it changes no digit of a gradient that fits.

    An update whose gradients overflow is computed again at half the scale instead of being left out: masks and dropout
    are keyed by the step, so it is the same update, and every rank and engine does the same.
    """

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = FIRST if self.dynamic else 1.0
        self._good = 0

    def lower(self) -> bool:
        """After an overflow: True where the update can be computed again."""
        self._good = 0
        if self.value <= 1.0:
            return False
        self.value /= 2.0
        return True

    def fitted(self) -> None:
        """After an update that fitted."""
        self._good += 1
        if self.dynamic and self._good >= GROW_EVERY:
            self._good, self.value = 0, min(2.0 * self.value, LARGEST)

    def state(self) -> dict[str, Any]:
        """What a resume needs, as plain JSON."""
        return {"value": self.value, "good": self._good} if self.dynamic else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state`; one of another precision starts anew."""
        if self.dynamic and state:
            self.value, self._good = float(state["value"]), int(state["good"])
