from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.monitoring import heartbeat

HUNG = """
import sys, time
from pathlib import Path
from pretrain.monitoring.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 3, patience_seconds=1.0) as running:
    running.beat(41, "computing")
    running.beat(41, "reading")
    def a_disk_that_never_answers():
        time.sleep(60)
    a_disk_that_never_answers()
"""


def test_a_hung_rank_dumps_its_stacks_and_exits(tmp_path: Path) -> None:
    started = time.monotonic()
    hung = subprocess.run([sys.executable, "-c", HUNG, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert time.monotonic() - started < 20
    assert hung.returncode == 1
    assert "Timeout" in hung.stderr
    assert "a_disk_that_never_answers" in hung.stderr


def test_a_rank_that_makes_progress_is_not_killed(tmp_path: Path) -> None:
    moving = HUNG.replace(
        "def a_disk", "for step in range(8):\n        time.sleep(0.2); running.beat(step, 'computing')\n    def a_disk"
    )
    moving = moving.replace("    a_disk_that_never_answers()\n", "")
    assert subprocess.run([sys.executable, "-c", moving, str(tmp_path)], timeout=30).returncode == 0
    note = json.loads((tmp_path / "heartbeats" / "rank_3.start_0.json").read_text())
    assert (note["step"], note["phase"]) == (7, "computing")


def test_the_watchdog_survives_a_transient_disk_failure(tmp_path: Path) -> None:
    with heartbeat.Heartbeat(tmp_path, 0, 600, warn_seconds=0.5) as running:
        (tmp_path / "heartbeats").rename(tmp_path / "gone")
        time.sleep(0.3)
        (tmp_path / "gone").rename(tmp_path / "heartbeats")
        running.beat(7, "computing")
    assert json.loads((tmp_path / "heartbeats" / "rank_0.start_0.json").read_text())["step"] == 7


def test_the_rank_furthest_behind_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    for rank, step, phase in ((0, 9, "computing"), (1, 9, "reading"), (2, 9, "computing"), (3, 10, "reading")):
        note = {"start": 2, "rank": rank, "step": step, "phase": phase, "since": 1000.0}
        (folder / f"rank_{rank}.json").write_text(json.dumps(note))
    (folder / "rank_4.json").write_text("{cut o")
    said = heartbeat.slowest(tmp_path, 2, now=1090.0)
    assert "of 4 ranks is rank 1: reading at step 9 for 90 s" in said
    assert heartbeat.slowest(tmp_path / "nothing", 2) == ""


def test_ranks_of_an_earlier_start_are_not_named(tmp_path: Path) -> None:
    """A run on four ranks continues on two: the files of ranks 2 and 3 remain, several steps behind."""
    for start, world, step in ((1, 4, 9), (2, 2, 12)):
        for rank in range(world):
            with heartbeat.Heartbeat(tmp_path, rank, 600, start=start) as running:
                running.beat(step + (rank == 0), "computing")
    assert "of 2 ranks is rank 1: computing at step 12" in heartbeat.slowest(tmp_path, 2)
    assert heartbeat.slowest(tmp_path, 3) == ""


def test_the_computing_rank_is_told_apart_from_waiting_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    for rank, parts, part in ((0, 4, "sum of losses"), (1, 3, "backward pass"), (2, 4, "sum of losses")):
        note = {
            "start": 1,
            "rank": rank,
            "step": 9,
            "phase": "computing",
            "parts": parts,
            "part": part,
            "since": 1000.0,
        }
        (folder / f"rank_{rank}.json").write_text(json.dumps(note))
    assert "is rank 1: computing (backward pass) at step 9 for 5 s" in heartbeat.slowest(tmp_path, 1, now=1005.0)
    (folder / "rank_1.json").unlink()
    assert "is one of 0, 2: computing (sum of losses)" in heartbeat.slowest(tmp_path, 1, now=1005.0)


def test_a_superseded_start_keeps_out_of_the_heartbeats_and_log_of_the_newer_one(tmp_path: Path) -> None:
    """It runs in a process of its own, so that its output can be redirected to a separate log."""
    script = """
import sys, time
from pathlib import Path
from launch.workers.environment import log_to
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.monitoring.heartbeat import Heartbeat
path = Path(sys.argv[1])
log_to(path / "logs" / "rank_0.log")
run = RunFolder(path)
run.claim()
with Heartbeat(path, 0, 600, warn_seconds=0.5, start=run.incarnation, superseded=run.superseded) as running:
    running.beat(1, "computing")
    time.sleep(0.3)
    print("first", flush=True)
    RunFolder(path).claim()
    newer = Heartbeat(path, 0, 600, warn_seconds=2.0, start=2)
    with newer:
        newer.beat(7, "computing")
        time.sleep(0.5)
        print("late", flush=True)
        running.beat(2, "computing")
        time.sleep(0.3)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    notes = {path.name: json.loads(path.read_text()) for path in (tmp_path / "heartbeats").glob("*.json")}
    assert set(notes) == {"rank_0.start_2.json"}, "heartbeats of older starts are removed and not written again"
    assert notes["rank_0.start_2.json"]["step"] == 7
    assert (tmp_path / "logs" / "rank_0.log").read_text() == "first\n"
    assert (tmp_path / "logs" / "rank_0.superseded_1.txt").read_text() == "late\n"


def test_only_older_heartbeats_of_the_same_rank_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    for name in ("rank_1.json", "rank_1.start_2.json", "rank_1.start_9.json", "rank_10.json", "rank_2.start_1.json"):
        (folder / name).write_text("{}")
    with heartbeat.Heartbeat(tmp_path, 1, 600, start=3):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank_1.start_3.json",
        "rank_1.start_9.json",
        "rank_10.json",
        "rank_2.start_1.json",
    ]


GOOD = {"start": 1, "rank": 0, "step": 4, "phase": "computing", "since": 1000.0}


@pytest.mark.parametrize(
    "damaged",
    [
        {"start": 1},
        GOOD | {"phase": "x"},
        GOOD | {"phase": ["reading"]},
        GOOD | {"rank": "1"},
        GOOD | {"step": None},
        GOOD | {"step": -1},
        GOOD | {"step": True},
        GOOD | {"step": 10**400},
        GOOD | {"since": "now"},
        GOOD | {"since": float("nan")},
        GOOD | {"parts": {}},
        GOOD | {"micro_batches": 2.5},
        GOOD | {"part": "\x1b]0;title"},
        [],
        None,
    ],
    ids=str,
)
def test_a_damaged_heartbeat_is_left_out_and_the_others_are_compared(tmp_path: Path, damaged: Any) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    (folder / "rank_1.start_1.json").write_text(json.dumps(GOOD | {"rank": 1, "step": 9}))
    (folder / "rank_2.start_1.json").write_text(json.dumps(damaged))
    (folder / "rank_3.start_1.json").write_bytes(b"\xff\xfe{")
    (folder / "rank_4.start_1.json").mkdir()
    assert "the slowest of 1 ranks is rank 1: computing at step 9" in heartbeat.slowest(tmp_path, 1, now=1090.0)
    assert [note.rank for note in heartbeat.read_notes(tmp_path)] == [1]


def test_odd_names_beside_the_heartbeats_do_not_end_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    odd = {"rank_0.start_\u00b2.json", "rank_0.nfs0001", "rank_0.start_.json", ".DS_Store"}
    for name in odd:
        (folder / name).touch()
    with heartbeat.Heartbeat(tmp_path, 0, 600, start=3):
        pass
    assert {path.name for path in folder.iterdir()} == odd | {"rank_0.start_3.json"}
