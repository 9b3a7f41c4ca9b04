"""What the driver of a gang on Ray does about how a gang ended, without a Ray."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import ExitCode
from launch.launchers import ray_driver


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments of a run that has not begun."""
    monkeypatch.setattr(ray_driver, "SETTLE", 0.0)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"micro_batches": 4}, "train": {"steps": 9}}))
    return argparse.Namespace(folder=tmp_path, workers=0, min_workers=1, gpus=0, cpus=1, retries=3)


def test_a_superseded_gang_is_not_started_again(given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([1, ExitCode.SUPERSEDED])
    monkeypatch.setattr(ray_driver, "_room", lambda cpus, gpus: 4)
    monkeypatch.setattr(ray_driver, "_run_gang", lambda given, world: next(codes))
    assert ray_driver._persist(given) == ExitCode.SUPERSEDED


def test_a_busy_cluster_is_waited_for_and_a_smaller_one_is_taken_as_it_is(
    given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten times no place, which is no failure; then a node is gone, and half as many ranks find theirs."""
    waits = iter([*[False] * 10, True])
    room = iter([4, *[4] * 9, 2, 2])
    attended: list[int] = []

    class Group:
        def wait(self, seconds: float) -> bool:
            return next(waits)

    def attend(ranks: list[Any], given: argparse.Namespace, world: int) -> int:
        attended.append(world)
        return ExitCode.DONE

    groups = importlib.import_module("ray.util.placement_group")  # a function of that name hides it
    monkeypatch.setattr(groups, "placement_group", lambda bundles, strategy: Group())
    monkeypatch.setattr(groups, "remove_placement_group", lambda group: None)
    monkeypatch.setattr("ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy", lambda *a, **b: None)
    monkeypatch.setattr("ray.remote", lambda kind: Actor())
    monkeypatch.setattr(ray_driver, "_room", lambda cpus, gpus: next(room))
    monkeypatch.setattr(ray_driver, "_attend", attend)
    assert ray_driver._persist(given) == ExitCode.DONE
    assert attended == [2]
    said = capsys.readouterr().out
    assert said.count("waiting: the cluster is busy") == 1
    assert "failures" not in said


class Actor:
    def options(self, **options: Any) -> Actor:
        return self

    def remote(self) -> None: ...
