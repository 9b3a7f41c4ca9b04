"""The gate of the out-of-domain proof: +5 points over random weights and, for phones, +3 over log-mel with context."""

from __future__ import annotations

import pytest

from benchmarks.prove.out_of_domain import passed


@pytest.mark.parametrize(
    ("task", "over_random", "over_log_mel", "expected"),
    [
        ("phones", 0.05, 0.03, True),
        ("phones", 0.05, 0.029, False),
        ("phones", 0.049, 0.08, False),
        ("keywords", 0.05, -0.1, True),
        ("digits", 0.049, 0.2, False),
    ],
)
def test_gate(task: str, over_random: float, over_log_mel: float, expected: bool) -> None:
    row = {"task": task, "over_random": [over_random, 0.0, 0.1], "over_log_mel": [over_log_mel, 0.0, 0.1]}
    assert passed(row) is expected
