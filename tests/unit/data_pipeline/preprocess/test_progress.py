"""Terminal progress of a preprocessing job."""

from __future__ import annotations

import io

from rich.console import Console

from data_pipeline.core.types import AudioFile
from data_pipeline.preprocess.plan_file import WorkUnit
from data_pipeline.preprocess.progress import live_progress
from data_pipeline.preprocess.unit_worker import UnitResult
from data_pipeline.shards.records import DoneRecord


def test_progress_shows_files_hours_speed_and_rejects() -> None:
    todo = [WorkUnit(name, (AudioFile(f"{name}.wav", name, "corpus", seconds=3600.0),)) for name in ("a", "b")]
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=160)
    flow = (("corpus", "en", "in", "", 1, 3600 * 16_000),)
    record = DoneRecord("a", "", "", 0, "", 0, 0, rejects={"cut/too_short": 2}, files=1, flow=flow)
    with live_progress(todo, True, console) as advance:
        advance(UnitResult(record, 1.0))
    text = said.getvalue()
    for shown in ("50%", "1 files", "1.00 h", "× real time", "2 rejected", "ETA"):
        assert shown in text
