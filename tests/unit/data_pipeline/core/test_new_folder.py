"""A new folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError


def test_the_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "parent" / "out"
    with new_folder(out) as made:
        (made / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_after_an_exception_nothing_is_left(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as made:
            (made / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with (
        pytest.raises(ConfigError, match="out exists; give a new folder for the run"),
        new_folder(tmp_path / "out", "for the run"),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
