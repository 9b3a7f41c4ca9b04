"""Shards on an S3 server (moto on loopback): range reads and cached copies give the batches of local disks."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Step
from data_pipeline.loader.reader import open_reader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.plan import make_plan
from data_pipeline.sampling.prefetch_order import PlanSchedule
from data_pipeline.shards.cache import to_evict
from data_pipeline.shards.local import ShardError
from tests.support.catalogs import catalogue_of, random_shards, reader_config
from tests.support.tiny_shards import sounds, write_shards

BATCH = {"batch_seconds": 8.0, "micro_batches": 2, "min_seconds": 0.3, "max_seconds": 1.6, "shuffle_window": 2}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Returns an s3:// URL and a local folder with the same shards."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in names | endpoint}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.environ.update(names | endpoint)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        lengths = np.random.default_rng(0).uniform(0.4, 2.0, 120).tolist()
        everything = sounds(lengths)
        folder = write_shards(tmp_path_factory.mktemp("local"), [everything[i::6] for i in range(6)])
        fs = s3fs.S3FileSystem()
        fs.mkdir("speech")
        fs.put(f"{folder}/", "speech/shards/", recursive=True)
        yield "s3://speech/shards", folder
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def read(root: str, count: int, **values: object) -> list[Step]:
    reader = open_reader(DataConfig(**{"shards": root, "workers": 0, **BATCH, **values}), 7, 0, 1)  # type: ignore[arg-type]
    try:
        return list(itertools.islice(reader.steps(), count))
    finally:
        reader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_remote_batches_equal_local_ones(bucket: tuple[str, Path], tmp_path: Path, workers: int, cached: bool) -> None:
    url, folder = bucket
    space = {"cache": str(tmp_path), "cache_gigabytes": 0.005 if cached else 0.0, "verify": cached}
    far, near = read(url, 30, workers=workers, **space), read(str(folder), 30)
    for a, b in zip(far, near, strict=True):
        assert a.after == b.after
        for x, y in zip(a.batches, b.batches, strict=True):
            assert x.keys == y.keys
            assert torch.equal(x.wave_BT, y.wave_BT)
    assert bool(list(tmp_path.rglob("*.tar"))) == cached


def test_the_cache_stays_below_its_size_limit(bucket: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = bucket
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    limit = 4.2 * largest
    small = BATCH | {"batch_seconds": 1.7, "micro_batches": 1}
    assert limit < total
    reader = open_reader(
        DataConfig(shards=url, workers=0, cache=str(tmp_path), cache_gigabytes=limit / 1e9, **small), 7, 0, 1  # type: ignore[arg-type]
    )  # fmt: skip
    for _, _ in zip(range(80), reader.steps(), strict=False):
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= limit
    reader.close()


def test_a_vanished_shard_is_an_error_or_a_counted_skip(bucket: tuple[str, Path], tmp_path: Path) -> None:
    import s3fs

    url, _ = bucket
    fs = s3fs.S3FileSystem()
    config = {"shards": url, "workers": 0, **BATCH}
    strict, lenient = (
        open_reader(DataConfig(**config, on_bad_shard=choice), 7, 0, 1) for choice in ("error", "skip")  # type: ignore[arg-type]
    )  # fmt: skip
    saved = fs.cat_file("speech/shards/shard-0003.tar")
    fs.rm_file("speech/shards/shard-0003.tar")
    try:
        with pytest.raises(ShardError, match=r"shard-0003\.tar: cannot be read"):
            list(itertools.islice(strict.steps(), 60))
        steps = lenient.plan.layout(0).steps
        assert sum(step.skipped for step in itertools.islice(lenient.steps(), steps)) > 0
    finally:
        strict.close()
        lenient.close()
        fs.pipe_file("speech/shards/shard-0003.tar", saved)


def test_contradictory_cache_settings_are_refused(bucket: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.cache_gigabytes"):
        read(bucket[0], 1, verify=True)
    with pytest.raises(ConfigError, match="that are mixed at a time"):
        read(bucket[0], 1, cache=str(tmp_path), cache_gigabytes=1e-6)


def misses(sequence: list[int], space: int, evict: object) -> int:
    """Returns the number of fetches of a cache of `space` shards over a sequence of uses."""
    cached: list[int] = []
    count = 0
    for at, shard in enumerate(sequence):
        if shard not in cached:
            count += 1
            if len(cached) == space:
                cached.remove(evict(cached, at))  # type: ignore[operator]
            cached.append(shard)
        else:
            cached.remove(shard)
            cached.append(shard)
    return count


def fewest_misses(sequence: list[int], space: int) -> int:
    """Returns the minimum number of fetches, by exhaustive search over all evictions."""
    states = {frozenset[int](): 0}
    for shard in sequence:
        after: dict[frozenset[int], int] = {}
        for cached, cost in states.items():
            options = [cached] if shard in cached else (
                [cached | {shard}] if len(cached) < space else [(cached - {out}) | {shard} for out in cached]
            )  # fmt: skip
            for option in options:
                new = cost + (shard not in cached)
                after[option] = min(new, after.get(option, new))
        states = after
    return min(states.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_eviction_by_next_use_is_optimal(seed: int, space: int) -> None:
    rng = np.random.default_rng(seed)
    sequence = [int(s) for _ in range(4) for s in rng.permutation(6)]

    def by_next_use(cached: list[int], at: int) -> int:
        use = np.array([sequence.index(s, at) if s in sequence[at:] else 10**6 for s in range(6)])
        return to_evict(dict.fromkeys(cached, 1), use, space, 1)[0]

    found = misses(sequence, space, by_next_use)
    assert found == fewest_misses(sequence, space)
    assert found <= misses(sequence, space, lambda cached, at: cached[0])  # the least recently used shard


def test_next_use_counts_windows_ahead() -> None:
    plan = make_plan(catalogue_of(random_shards(0, 12, 120)), reader_config(shuffle_window=3), 0)
    windows = len(plan.layout(0).step_W1) - 1
    assert windows == 4
    for window in range(windows):
        use_S = PlanSchedule(plan).next_use(0, window)
        for s in range(12):
            at = int(np.flatnonzero(plan.layout(0).shard_U == s)[0]) // 3
            again = int(np.flatnonzero(plan.layout(1).shard_U == s)[0]) // 3
            assert use_S[s] == (at - window if at >= window else windows - window + again)
    assert to_evict({0: 5, 1: 5}, np.array([0, 0]), 8, 5) == []
