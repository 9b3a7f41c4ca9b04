"""The rows of an evaluation's table, and what probes show beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ResultRow:
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


@dataclass(frozen=True)
class Detail:
    """Further results of a fitted probe of one encoder.

    by_layer: accuracy of single layers on the speakers by which the layer was chosen.  confusion_CC: counts of (true,
    predicted) over the counted vectors of the test split.  classes: names of its rows and columns.
    """

    task: str
    who: str
    by_layer: tuple[float, ...] = ()
    confusion_CC: np.ndarray | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()


def plain(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Returns the rows as plain values for JSON."""
    return [asdict(row) for row in rows]
