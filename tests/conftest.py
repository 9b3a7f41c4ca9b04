"""Fixtures for all tests, and how two workers share them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.paths import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other


pytest_plugins = ("tests.support.parity_table",)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real speech beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "manifest.tsv").is_file():
        pytest.skip(f"needs real speech at {folder}")
    return folder


FIRST = ("test_slurm", "test_every_objective", "test_ray_gang")
"""The longest files begin; xdist gives a worker every other one, so that both clusters are with the same."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadfile --no-loadscope-reorder`."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
