"""Transient errors of remote storage change no batch; persistent errors name the shard."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Step
from data_pipeline.loader.reader import open_reader
from data_pipeline.sampling.config import DataConfig
from tests.support.clock import skip_pauses
from tests.support.tiny_shards import sounds, write_shards

BATCH: dict[str, Any] = {"batch_seconds": 6.0, "micro_batches": 2, "min_seconds": 0.1, "max_seconds": 1.0}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    everything = sounds([0.5 + i % 5 / 10 for i in range(40)])
    folder = write_shards(tmp_path / "set", [everything[i::2] for i in range(2)])
    fs = fsspec.filesystem("memory")
    fs.put(f"{folder}/", "/flaky/", recursive=True)
    yield "memory://flaky"
    fs.rm("/flaky", recursive=True)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_pauses(monkeypatch)


def steps(url: str, **values: Any) -> list[Step]:
    reader = open_reader(DataConfig(shards=url, workers=0, **BATCH, **values), 0, 0, 1)
    try:
        return list(itertools.islice(reader.steps(), 6))
    finally:
        reader.close()


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception, times: float) -> None:
    """Makes the first `times` range reads and the first two reads of whole files fail."""
    whole, ranges, left = MemoryFileSystem.cat_file, MemoryFileSystem.cat_ranges, {"ranges": times, "whole": 2.0}

    def cat_ranges(self: Any, paths: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        left["ranges"] -= 1
        return [error] * len(paths) if left["ranges"] >= 0 else ranges(self, paths, *args, **kwargs)

    def cat_file(self: Any, *args: Any, **kwargs: Any) -> Any:
        left["whole"] -= 1
        if left["whole"] >= 0:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_transient_fault_changes_no_batch(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = steps(url)
    fail(monkeypatch, ConnectionResetError(errno.ECONNRESET, "reset"), 5)
    for a, b in zip(calm, steps(url), strict=True):
        assert [batch.keys for batch in a.batches] == [batch.keys for batch in b.batches]
        assert all((x.wave_BT == y.wave_BT).all() for x, y in zip(a.batches, b.batches, strict=True))
        assert b.skipped == 0


@pytest.mark.parametrize("on_bad_shard", ["error", "skip"])
def test_a_persistent_fault_ends_the_run_and_names_a_shard(
    url: str, monkeypatch: pytest.MonkeyPatch, on_bad_shard: str
) -> None:
    fail(monkeypatch, TimeoutError("slow"), float("inf"))
    with pytest.raises(StorageReadError, match=r"shard-000\d\.tar: cannot be read for data\.retry_seconds=30") as ended:
        steps(url, retry_seconds=30.0, on_bad_shard=on_bad_shard)
    assert not isinstance(ended.value, ConfigError)
