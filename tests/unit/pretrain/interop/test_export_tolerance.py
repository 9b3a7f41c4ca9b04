"""Exports that differ too much, or cannot be compared, are refused."""

from __future__ import annotations

import math

import pytest

from data_pipeline.core.schema import ConfigError
from pretrain.interop.export_tolerance import TOLERANCE, Format, require_close


@pytest.mark.parametrize("kind", TOLERANCE)
def test_only_differences_within_the_tolerance_pass(kind: Format) -> None:
    require_close(TOLERANCE[kind], kind, "model")
    for difference in (1.01 * TOLERANCE[kind], math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"^model: .*allowed: 1e-0[45]"):
            require_close(difference, kind, "model")
