"""RUN/STOP: which start a stop request addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.workers.stop_request import START_ID, STOP_FILE, request_stop, stop_requested


def test_a_request_for_an_older_start_does_not_stop_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(START_ID, "newer")
    assert not stop_requested(tmp_path)
    request_stop(tmp_path, "older")
    assert not stop_requested(tmp_path)
    request_stop(tmp_path, "newer")
    assert stop_requested(tmp_path)


@pytest.mark.parametrize(("content", "requested"), [(b"", True), (b" \n", True), (b"\xff", False), (b"mine\n", True)])
def test_a_file_created_by_hand_stops_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, requested: bool
) -> None:
    monkeypatch.setenv(START_ID, "mine")
    (tmp_path / STOP_FILE).write_bytes(content)
    assert stop_requested(tmp_path) is requested


def test_a_rank_without_a_launcher_ignores_requests_for_a_specific_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(START_ID, raising=False)
    request_stop(tmp_path, "older")
    assert not stop_requested(tmp_path)
    request_stop(tmp_path)
    assert stop_requested(tmp_path)
