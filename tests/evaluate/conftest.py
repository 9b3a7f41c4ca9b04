"""Fixtures of the evaluation tests: a corpus of tones and a saved run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tones import write_tones
from tests.support.training import save


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run folder with one checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save(folder, 4)
    return folder
