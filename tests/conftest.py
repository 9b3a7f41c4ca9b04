"""Fixtures shared by all tests, and the order in which three workers take the test files."""

from __future__ import annotations

import atexit
import csv
import os
import shutil
import signal
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpora.local_speech import MANIFEST_NAME, SPEECH_VARIABLE, speech_folder

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets its workers wait for the other tests
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="auricle-tests-")  # the list of indexed folders of tars
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, which children inherit
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup


pytest_plugins = ("tests.support.parity_table", "tests.support.streams")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seeds the global generators by the test's name, before its fixtures: every run draws the same numbers."""
    import torch  # only now: it reads OMP_NUM_THREADS when it is imported

    seed = zlib.crc32(item.nodeid.encode())
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """The folder of real speech that AURICLE_SPEECH names; tests that need it are skipped where it is unset."""
    folder = speech_folder()
    if folder is None:
        pytest.skip(f"needs real speech: set {SPEECH_VARIABLE} to a folder with {MANIFEST_NAME}")
    if not (folder / MANIFEST_NAME).is_file():
        pytest.skip(f"needs labelled speech: {SPEECH_VARIABLE}={folder} has no {MANIFEST_NAME}")
    return folder


@pytest.fixture(scope="session")
def utterances(real_speech: Path) -> list[Path]:
    """FLAC files of the manifest's split `pretrain` that last six seconds or more, in the order of their paths."""
    with (real_speech / MANIFEST_NAME).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = sorted(
        real_speech / row["path"]
        for row in rows
        if row["split"] == "pretrain" and row["path"].endswith(".flac") and float(row["duration_s"]) >= 6
    )
    if len(found) < 8:
        pytest.skip(f"needs eight FLAC files of 6 s or more in split pretrain of {SPEECH_VARIABLE}={real_speech}")
    return found


FIRST = (
    "test_slurm",
    "test_every_objective",
    "test_health_monitor",
    "test_preprocess_kills",
    "test_engines",
)
"""The longest test files start first. xdist deals files out alternately, so both clusters fall to the same worker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 3 --dist loadfile --no-loadscope-reorder`."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
