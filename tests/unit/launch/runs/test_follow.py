"""The live view of a running job."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.core.schema import dump, load
from launch.runs.follow import Follower, ending, first_update, follow, losses, sparkline, time_left
from pretrain.config import Config
from tests.support.checkpoint_states import write_state


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


def test_a_piped_output_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.runs.follow.PLAIN_EVERY", 0.0)
    metrics, polls = tmp_path / "metrics.jsonl", iter(range(7))

    def running() -> bool:
        poll = next(polls)
        if poll in (2, 4):
            with metrics.open("a") as file:
                file.write(json.dumps(row(poll, 10.0 * poll, 5.0 - poll)) + "\n")
        return poll < 6

    console = Console(file=io.StringIO(), width=200)
    follow(tmp_path, 63, running, console)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("  ")[0] for line in shown[1:]] == ["step 2/63", "step 4/63"]


def test_nothing_is_cut_on_a_terminal_of_80_columns(tmp_path: Path) -> None:
    lines = [json.dumps(row(10_000 + i, 10.0 * i, 5.0 - i / 10)) for i in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    polls = iter([True, True, True, False])
    follow(tmp_path, 400_000, lambda: next(polls), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10029/400000" in shown
    assert "45 d 3 h left" in shown
    assert "…" not in shown


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


def test_the_first_update_says_which_micro_batch_it_is_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data": {"micro_batches": 8}, "train": {"steps": 5}}))
    assert first_update(tmp_path) == "starting the ranks: model, shards and plan"
    (tmp_path / "heartbeats").mkdir()

    def beat(rank: int, start: int, phase: str, micro_batches: int) -> None:
        note = {"start": start, "rank": rank, "step": 0, "phase": phase, "micro_batches": micro_batches, "since": 1.0}
        (tmp_path / "heartbeats" / f"rank_{rank}.start_{start}.json").write_text(json.dumps(note))

    beat(0, 1, "computing", 4)
    beat(0, 2, "reading", 0)
    assert first_update(tmp_path) == "first update: reading audio", "an earlier start does not count"
    beat(0, 2, "computing", 3)
    beat(1, 2, "computing", 2)
    assert first_update(tmp_path) == "first update: 5 of 8 micro-batches"
    beat(1, 2, "computing", 12)
    assert first_update(tmp_path) == "first update: 8 of 8 micro-batches", "an overflowed fp16 update is repeated"
    (tmp_path / "heartbeats" / "rank_1.start_2.json").write_text("{")
    assert first_update(tmp_path) == "first update: 3 of 8 micro-batches"


def test_a_finished_run_ends_with_figures_and_the_next_commands(tmp_path: Path) -> None:
    def held_out(step: int) -> dict[str, float]:
        codes = {"metric/perplexity": step / 2, "metric/code_usage": step / 80}
        return {"loss/total": 5.5 - step / 20, "metric/accuracy": step / 200, **codes}

    rows = [
        row(step, 10.0 * step, 5.0 - step / 20)
        | {"perf/step_seconds": 2.0, "data/audio_hours": step / 100, "metric/accuracy": step / 100}
        | ({f"valid/{tag}": value for tag, value in held_out(step).items()} if step % 20 == 0 else {})
        for step in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    table = dict(ending(tmp_path, tmp_path / "checkpoints" / "step_00000040"))
    assert table["loss"] == "4.95 → 3.075"
    assert table["held-out loss"] == "4.5 → 3.5"
    assert table["held-out accuracy"] == "0.1 → 0.2"
    assert table["held-out code usage"] == "0.25 → 0.5"
    assert table["held-out perplexity"] == "10 → 20"
    assert table["training accuracy"].startswith("0.01 → ")
    assert table["time"] == "0:01:20 in 40 updates"
    assert table["audio"] == "0.40 h, 18 × real time"
    assert table["next"].startswith(f"auricle evaluate checkpoint={tmp_path}")
    assert "alarms" not in table


ENCODER = {"name": "transformer", "dim": 16, "layers": 1, "heads": 2, "ffn_dim": 16}
WAVEFORM = {"frontend": {"name": "waveform_conv", "channels": 8}, "objective": {"name": "wav2vec2"}}
ROTARY = {"frontend": {"name": "log_mel"}, "objective": {"name": "best_rq", "n_codes": 8}}
RECOGNISER = WAVEFORM | {"objective": {"name": "none"}, "heads": {"text": {"name": "ctc"}}}


@pytest.mark.parametrize(
    ("values", "positions", "shown"),
    [
        (WAVEFORM, "conv", ["evaluate checkpoint=RUN task=phones manifest=MANIFEST", "export RUN OUT", "board RUN"]),
        (
            ROTARY,
            "rope",
            ["evaluate checkpoint=RUN task=phones manifest=MANIFEST", "export RUN OUT --to onnx", "board RUN"],
        ),
        (
            RECOGNISER,
            "conv",
            [
                "evaluate checkpoint=RUN task=asr manifest=MANIFEST",
                "transcribe checkpoint=RUN files=AUDIO",
                "export RUN OUT",
                "board RUN",
            ],
        ),
    ],
)
def test_the_next_commands_fit_the_run(
    values: dict[str, Any], positions: str, shown: list[str], tmp_path: Path
) -> None:
    config = load(
        Config,
        values
        | {
            "encoder": ENCODER | {"positions": positions},
            "data": {"shards": "s", "labels": ["text"] if "heads" in values else []},
        },
    )
    newest = write_state(tmp_path, 40, config=dump(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(40, 1.0, 2.0)) + "\n")
    table = ending(tmp_path, newest)
    said = [value for _, value in table[[name for name, _ in table].index("next") :]]
    assert said == [f"auricle {line.replace('RUN', str(tmp_path))}" for line in shown]
