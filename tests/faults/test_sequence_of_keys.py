"""SIGKILL at random times, resumed on one and two ranks in turn: each step reads the keys of an undisturbed run.

The reader records each step it returns. A killed run may return a step twice (it died before the checkpoint), but
never a different one, and at the end none may be missing. `make prove-slow` runs the long form: 21 kills over ZeRO 1–3.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.jsonl import read_rows
from tests.support.faults.key_runs import prepare, start
from tests.support.faults.keys import handed_over
from tests.support.tiny_shards import sounds, write_shards


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits for the process, and fails unless it succeeds."""
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said.decode()


def kill_at(folder: Path, processes: list[subprocess.Popen[bytes]], step: int, wait: float) -> None:
    """Sends SIGKILL to all ranks `wait` seconds after the row of `step` was written, or when they end."""
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_rows(folder / "metrics.jsonl")):
        if any(process.poll() not in (None, 0) for process in processes):
            raise AssertionError(b"".join(p.communicate()[1] for p in processes if p.poll()).decode())
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def soak(tmp_path: Path, engine: dict[str, Any], kills: int, seed: int, worlds: tuple[int, ...] = (1, 2)) -> None:
    """Compares keys and losses of a run without kills and one with kills, on `worlds` ranks in turn."""
    rng, steps = random.Random(seed), 3 * kills + 6
    shards = write_shards(tmp_path / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(60)])])
    whole = prepare(tmp_path, "whole", shards, engine, steps)
    undisturbed = start(whole, worlds[0])
    killed = prepare(tmp_path, "killed", shards, engine, steps)
    for number in range(kills):
        target = rng.randint(3 * number + 1, 3 * number + 3)
        kill_at(killed, start(killed, worlds[number % len(worlds)]), target, rng.uniform(0, 0.5))
    finish(start(killed, worlds[kills % len(worlds)]))
    finish(undisturbed)

    assert handed_over(killed) == handed_over(whole)
    losses = [{row["step"]: row["loss/total"] for row in read_rows(run / "metrics.jsonl")} for run in (whole, killed)]
    assert sorted(losses[1]) == list(range(1, steps + 1))
    if len(worlds) > 1:
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), "the order of sums differs between world sizes"
    else:
        assert losses[1] == losses[0], "an unchanged world size must give identical bits"


@pytest.mark.slow
def test_resumed_runs_read_the_same_keys_on_one_and_two_ranks(tmp_path: Path) -> None:
    soak(tmp_path, {"name": "torch"}, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_runs_read_the_same_keys_under_every_zero_stage(tmp_path: Path, stage: int) -> None:
    soak(tmp_path, {"name": "deepspeed", "zero_stage": stage}, kills=7, seed=stage)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_runs_resumed_on_two_ranks_are_bit_identical_under_zero(tmp_path: Path, stage: int) -> None:
    soak(tmp_path, {"name": "deepspeed", "zero_stage": stage}, kills=3, seed=10 + stage, worlds=(2,))
