"""A clock for tests of waits: pauses take no time."""

from __future__ import annotations

import pytest

from data_pipeline.core import retries


def skip_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the clock of storage's retries: a pause moves it on and returns at once."""
    clock = [0.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
