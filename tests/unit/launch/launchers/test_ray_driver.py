"""Decisions of the Ray driver after each attempt, without a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from launch.exit_codes import ExitCode
from launch.launchers import ray_driver
from launch.launchers.ray_driver import NO_PLACE, ClusterRequest, choose_world, drive
from launch.launchers.ray_worker import RankEndedError
from launch.launchers.waiting import waiting_for
from launch.workers.stop_request import START_ID, request_stop


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterRequest:
    """A request for a run that has not begun, on a cluster with four slots."""
    monkeypatch.setattr(ray_driver, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray_driver, "process_capacity", lambda cpus, gpus: 4)
    monkeypatch.setattr(ray_driver, "cluster_contents", lambda: "it has 1 nodes")
    monkeypatch.setenv(START_ID, "this")
    (tmp_path / "config.json").write_text(json.dumps({"data": {"micro_batches": 4}, "train": {"steps": 9}}))
    return ClusterRequest(
        folder=tmp_path, workers=0, min_workers=1, gpus=0, cpus=1, retries=3, wait_minutes=1.0, grace=0.0, fixed=False
    )


def attempts(monkeypatch: pytest.MonkeyPatch, codes: Iterable[int]) -> list[int]:
    """Makes attempts end with these codes; returns the list to which each attempt adds its number of ranks."""
    ended, worlds = iter(codes), list[int]()

    def attempt(request: ClusterRequest, world: int) -> int:
        worlds.append(world)
        return next(ended)

    monkeypatch.setattr(ray_driver, "run_attempt", attempt)
    return worlds


@pytest.mark.parametrize("final", [ExitCode.SUPERSEDED, ExitCode.USAGE, ExitCode.UNHEALTHY, ExitCode.DONE])
def test_final_exit_codes_are_not_retried(
    request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch, final: ExitCode
) -> None:
    worlds = attempts(monkeypatch, [1, ExitCode.LOST, final])
    assert drive(request_) == final
    assert worlds == [4, 4, 4]


def test_consecutive_failures_without_a_checkpoint_end_the_run(
    request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(attempts(monkeypatch, [1] * 9)) == 0
    worlds = attempts(monkeypatch, [1] * 9)
    assert drive(request_) == 1
    assert len(worlds) == 4


def test_waits_for_a_busy_cluster_and_continues_on_a_smaller_one(
    request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten attempts find no free slots and are not failures; then a node is lost and half the ranks start."""
    sizes = iter([4] * 10 + [2])
    monkeypatch.setattr(ray_driver, "process_capacity", lambda cpus, gpus: next(sizes))
    worlds = attempts(monkeypatch, [NO_PLACE] * 10 + [ExitCode.DONE])
    assert drive(request_) == ExitCode.DONE
    assert worlds == [4] * 10 + [2]
    said = capsys.readouterr().out
    assert "waiting: the cluster is busy" in said
    assert "failures" not in said


@pytest.mark.parametrize(
    "wish",
    [{"min_workers": 8}, {"min_workers": 2, "workers": 1}, {"gpus": 1}, {"cpus": 64}],
    ids=["min_workers", "workers", "gpus", "cpus"],
)
@pytest.mark.parametrize("fixed", [True, False])
def test_an_impossible_request_is_refused_or_ends_within_the_wait_limit(
    request_: ClusterRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wish: dict[str, int],
    fixed: bool,
) -> None:
    monkeypatch.setattr(ray_driver, "process_capacity", lambda cpus, gpus: 0 if gpus or cpus > 4 else 4)
    reported: list[str] = []
    monkeypatch.setattr(ray_driver, "report_waiting", lambda folder, reason: reported.append(reason))
    worlds = attempts(monkeypatch, [])
    request = dataclasses.replace(request_, **wish, fixed=fixed, wait_minutes=0.001)
    assert drive(request) == (ExitCode.USAGE if fixed else ExitCode.FAILED)
    assert not worlds
    said = capsys.readouterr().out
    assert "launcher.min_workers=" in said
    assert ("launcher.wait_minutes=" in said) != fixed
    assert any(reported) != fixed, "the reason for waiting is printed"


def test_a_cluster_that_stays_busy_ends_the_run_after_the_wait_limit(
    request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts(monkeypatch, iter(lambda: NO_PLACE, None))
    assert drive(dataclasses.replace(request_, wait_minutes=0.001)) == ExitCode.FAILED


def test_a_stop_request_ends_the_wait(request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_driver, "process_capacity", lambda cpus, gpus: request_stop(request_.folder, "this") or 0)
    assert drive(request_) == ExitCode.STOPPED


def test_a_stop_request_for_an_earlier_start_is_ignored(
    request_: ClusterRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_stop(request_.folder, "earlier")
    attempts(monkeypatch, [ExitCode.STOPPED, ExitCode.DONE])
    assert drive(request_) == ExitCode.DONE, "a rank that stops without a request was on a lost node"
    assert waiting_for(request_.folder) == ""


@pytest.mark.parametrize(
    ("micro_batches", "places", "largest", "world"),
    [(64, 100, 0, 64), (64, 63, 0, 32), (12, 5, 0, 4), (12, 100, 3, 3), (7, 6, 0, 4), (4, 0, 0, 0)],
)
def test_the_fewest_ranks_that_need_no_more_rounds_are_chosen(
    micro_batches: int, places: int, largest: int, world: int
) -> None:
    assert choose_world(micro_batches, places, largest) == world


def test_exit_codes_of_ranks_are_returned_through_ray_train() -> None:
    from ray.train.v2._internal.util import construct_user_exception_with_traceback

    try:
        raise RankEndedError(int(ExitCode.UNHEALTHY))
    except RankEndedError as error:
        wrapped = construct_user_exception_with_traceback(error)
    assert RankEndedError.code_of(wrapped) == ExitCode.UNHEALTHY
    assert RankEndedError.code_of(RankEndedError(85)) == 85, "the exception that fit() raises in Ray 2.60"
    assert RankEndedError.code_of(ConnectionError("peer: RankEndedError: 4")) is None
