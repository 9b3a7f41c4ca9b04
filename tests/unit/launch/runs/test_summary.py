"""Runs are found among and below the folders that are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from launch.runs.summary import find_runs


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").touch()
    return folder


def test_runs_are_found_among_the_folders_and_below_them(tmp_path: Path) -> None:
    alone, below = make_run(tmp_path / "alone"), make_run(tmp_path / "runs" / "below")
    assert find_runs([alone, tmp_path / "runs"]) == [alone, below]


def test_a_folder_that_does_not_exist_is_refused_also_beside_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "best_rq")
    with pytest.raises(ConfigError, match=r"best_rk \(did you mean .*best_rq\?\)"):
        find_runs([run, tmp_path / "runs" / "best_rk"])


def test_an_option_without_dashes_is_refused_with_its_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--port 6123"):
        find_runs([make_run(tmp_path / "run"), Path("port=6123")])
