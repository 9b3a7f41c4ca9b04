"""Start numbers of a run folder in which file systems and tools leave files of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.launchers.process_guard import grace_seconds
from launch.launchers.retry import Progress
from pretrain.checkpointing.run_folder import RunFolder, StaleIncarnationError

ODD_NAMES = (".nfs0000a1", ".DS_Store", "000001~", "\u00b2", "\u0661", "-5", "1_0", "+7", "desktop.ini", "000009.tmp")


@pytest.mark.parametrize("name", [*ODD_NAMES, os.fsdecode(b"\xff")])
def test_other_files_beside_the_starts_are_no_starts(tmp_path: Path, name: str) -> None:
    first = RunFolder(tmp_path)
    assert first.claim() == 1
    (tmp_path / "incarnations" / name).touch()
    first.require_current()
    assert not first.superseded()
    assert Progress.of(tmp_path) == Progress(0, 1)
    second = RunFolder(tmp_path)
    assert second.claim() == 2
    assert first.superseded()
    with pytest.raises(StaleIncarnationError, match="start number 1 of the run and number 2 exists"):
        first.require_current()


def test_a_start_that_cannot_be_inspected_does_not_end_the_guard(tmp_path: Path) -> None:
    RunFolder(tmp_path).claim()
    (tmp_path / "incarnations" / "000002").symlink_to(tmp_path / "nothing")
    assert grace_seconds(tmp_path, 0.0) >= 30
