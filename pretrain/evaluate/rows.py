"""The rows of an evaluation's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of the table. Intervals are 95 % over test speakers; differences are paired by speaker.

    For measures without fitting, value and interval of random weights are means over the seeds.
    """

    task: str
    measure: str
    who: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    over_log_mel: tuple[float, float, float] | None = None
    over_random: tuple[float, float, float] | None = None
    retained: float | None = None
    """(value − log-mel) / (supervised − log-mel)."""


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows as plain values for JSON."""
    return [asdict(row) for row in rows]
