"""Terminal progress of a preprocessing job."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from data_pipeline.preprocess.plan_file import PlannedUnit
from data_pipeline.preprocess.progress import live_progress
from data_pipeline.preprocess.unit_worker import UnitResult
from data_pipeline.shards.records import DoneRecord


@pytest.mark.parametrize(("columns", "files"), [(80, 12_345), (160, 1_234_567)])
def test_progress_shows_files_hours_speed_and_rejects(columns: int, files: int) -> None:
    todo = [PlannedUnit(name, "", "table", 0, 1, seconds=3600.0, first_id=f"{name}.wav") for name in ("a", "b")]
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=columns)
    flow = (("corpus", "en", "in", "", 1, 3600 * 16_000),)
    record = DoneRecord("a", "", "", 0, "", 0, 0, rejects={"cut/too_short": 2}, files=files, flow=flow)
    with live_progress(todo, True, console) as advance:
        advance(UnitResult(record, 1.0))
    text = said.getvalue()
    for shown in ("50%", f"{files:,} files", "1.00 h", "× real time", "2 rejected", "ETA"):
        assert shown in text
    assert "…" not in text
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()) <= columns
