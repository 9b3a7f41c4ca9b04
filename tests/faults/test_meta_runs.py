"""Runs of meta-learning in processes: SIGKILL and two ranks change neither losses nor weights."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

import pytest

from data_pipeline.core.jsonl import read_rows
from tests.support.faults.kill_runs import STEPS, kill_after, prepare, start
from tests.support.faults.site import learned
from tests.support.tiny_shards import Sound, write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

META: Final[dict[str, dict[str, Any]]] = {
    "data": {
        "batch_seconds": 8.0,
        "min_seconds": 0.1,
        "episodes": {"label": "language", "ways": 3, "shots": [1, 2], "queries": 2},
    },
    "encoder": {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0},
    "frontend": {"dropout": 0.0},
    "objective": {"name": "none"},
    "heads": {"words": {"name": "episode", "ways": 3, "layers": [1, 2]}},
    "optimizer": {"lr": 1e-3},
    "engine": {
        "name": "meta",
        "meta": {"method": "maml", "inner": "words", "inner_steps": 2, "inner_lr": 0.1, "learn_lr": True},
    },
}
"""MAML of the whole encoder; languages stand for words."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sounds = [
        Sound(f"c{c}-s{s}-{take}", 6400 + 320 * take + 160 * c, language=f"class {c}", speaker=f"speaker {s}")
        for c in range(5)
        for s in range(4)
        for take in range(3)
    ]
    return write_shards(tmp_path_factory.mktemp("meta"), [sounds[::2], sounds[1::2]])


def prepared(runs: Path, name: str, shards: Path) -> Path:
    return prepare(runs, name, shards, META)


def test_a_killed_run_started_again_has_the_bits_of_an_undisturbed_one(shards: Path, tmp_path: Path) -> None:
    whole, killed = prepared(tmp_path, "whole", shards), prepared(tmp_path, "killed", shards)
    undisturbed = start(whole)
    for step, extra in ((2, 0.05), (7, 0.15)):
        kill_after(killed, start(killed), step, extra)
    assert start(killed).wait(timeout=240) == 0
    assert undisturbed.wait(timeout=240) == 0
    assert learned(killed) == learned(whole)
    assert [step for step, _, _ in learned(killed)] == list(range(1, STEPS + 1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        end = Path("checkpoints") / f"step_{STEPS:08d}" / name
        assert (killed / end).read_bytes() == (whole / end).read_bytes()
    rates = [row["meta/inner_rate"] for row in read_rows(whole / "metrics.jsonl")]
    assert rates[-1] != rates[0]


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ({"ways": 9}, "data.episodes.ways=9, data.episodes.shots=1: too few classes"),
        ({"shots": [30]}, "data.episodes.ways=3, data.episodes.shots=30: too few classes"),
        ({"label": "mood"}, "data.episodes.label=mood"),
    ],
)
def test_too_few_classes_or_examples_end_with_what_there_is(
    episodes: dict[str, Any], message: str, shards: Path, tmp_path: Path
) -> None:
    data = {**META["data"], "episodes": {**META["data"]["episodes"], **episodes}}
    heads = {"words": {**META["heads"]["words"], "ways": episodes.get("ways", 3)}}
    process = start(prepare(tmp_path, "run", shards, {**META, "data": data, "heads": heads}))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in said.decode()
    assert "Traceback" not in said.decode()
    if "too few" in message:
        assert "there are 5 classes, 4 speakers and 60 recordings" in said.decode()


def test_two_ranks_learn_from_the_same_episodes_with_the_same_losses(shards: Path, tmp_path: Path) -> None:
    one, two = prepared(tmp_path, "one", shards), prepared(tmp_path, "two", shards)
    alone = start(one)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    ranks = [start(two, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in (*ranks, alone)] == [0, 0, 0]
    assert len(learned(one)) == len(learned(two)) == STEPS
    for (step, loss, norm), (same_step, same_loss, same_norm) in zip(learned(one), learned(two), strict=True):
        assert step == same_step
        assert same_loss == pytest.approx(loss, rel=1e-5)
        assert same_norm == pytest.approx(norm, rel=1e-3)
    queries = [[row["meta/query_loss_after"] for row in read_rows(folder / "metrics.jsonl")] for folder in (one, two)]
    assert queries[1] == pytest.approx(queries[0], rel=1e-5)
