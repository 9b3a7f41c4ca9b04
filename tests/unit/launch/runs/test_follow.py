"""The live view of a running job."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from rich.console import Console

from launch.runs.follow import Follower, follow, losses, sparkline, time_left


def row(step: int, time: float, loss: float) -> dict[str, float]:
    return {"step": step, "time": time, "loss/total": loss, "opt/lr": 1e-3, "perf/audio_seconds_per_second": 70.0}


def test_the_sparkline_shows_the_whole_curve() -> None:
    assert sparkline([8.0, 4.5, 1.0], 16) == "█▅▁"
    falling = sparkline([100.0 - i for i in range(1000)], 8)
    assert falling == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_outliers_and_non_finite_values_do_not_hide_the_curve() -> None:
    rows = [row(i, float(i), 1e6 if i == 500 else math.nan if i == 7 else 9.0 - i / 200) for i in range(1600)]
    assert sparkline(losses(rows)) == sparkline([9.0 - i / 200 for i in range(1600)])
    assert len(losses(rows * 100)) <= 1024


def test_the_remaining_time_is_estimated_from_recent_steps() -> None:
    slow = [row(i, 100.0 * i, 1.0) for i in range(10)]
    resumed = [row(10 + i, 5000 + 2.0 * i, 1.0) for i in range(60)]
    assert time_left([*slow, *resumed], 100) == "0:01:02 left"
    assert time_left(slow[:1], 100) == ""
    assert time_left(slow, 9) == "0:00:00 left"


def test_a_terminal_shows_progress_time_and_curve(tmp_path: Path) -> None:
    lines = [json.dumps(row(i, 10.0 * i, 5.0 - i)) for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    polls = iter([True, True, True, False])
    assert len(follow(tmp_path, 63, lambda: next(polls), console).rows) == 3
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("loss 2.0000", "70 × real time", "█▅▁", "3/63", "0:10:00 left"):
        assert part in shown


def test_a_resumed_run_is_read_from_the_start(tmp_path: Path) -> None:
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    path.write_text(json.dumps(row(1, 0.0, 5.0)) + "\n" + '{"step": 2')
    first = follower.read()
    assert first is not None
    assert first["step"] == 1
    other = tmp_path / "new"
    other.write_text(json.dumps(row(7, 0.0, 5.0)) + "\n")
    other.replace(path)
    again = follower.read()
    assert again is not None
    assert again["step"] == 7
    assert len(follower.rows) == 1
