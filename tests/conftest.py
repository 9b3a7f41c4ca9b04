"""Fixtures for all tests, and how two workers share them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real speech beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "manifest.tsv").is_file():
        pytest.skip(f"needs real speech at {folder}")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: a file stays with one worker, which shares its fixtures; long ones are dealt out."""
    for item in items:
        if item.path.parent.name not in ("contract", "parity"):
            group = "slurm" if item.path.stem in ("test_slurm", "test_ray_gang") else str(item.path.relative_to(ROOT))
            item.add_marker(pytest.mark.xdist_group(group))
