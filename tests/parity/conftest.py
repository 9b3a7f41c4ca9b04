"""`parity(quantity, tolerance, error)` asserts and adds a row to the table that pytest prints at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

WORST: dict[tuple[str, float], float] = {}


@pytest.fixture
def parity() -> Callable[[str, float, float], None]:
    def check(quantity: str, tolerance: float, error: float) -> None:
        WORST[quantity, tolerance] = max(WORST.get((quantity, tolerance), 0.0), error)
        assert error <= tolerance, f"{quantity}: error {error:.2e} is above {tolerance:.0e}"

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if WORST:
        terminalreporter.section("parity")
        for (quantity, tolerance), error in sorted(WORST.items()):
            terminalreporter.write_line(f"{quantity:<70} asked ≤ {tolerance:.0e}   worst {error:.1e}")
