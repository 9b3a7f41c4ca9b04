"""Catalogs of random shards for the sampler's tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.sampling.catalog import Catalogue, Group
from data_pipeline.sampling.config import DataConfig

SECOND = SAMPLE_RATE


def catalogue_of(shards: list[list[float]], groups: list[list[int]] | None = None, n_groups: int = 1) -> Catalogue:
    """Returns the catalog of shards whose segments are given in seconds."""
    starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])]).astype(np.int64)
    lengths = np.array([round(s * SECOND) for shard in shards for s in shard], np.uint32)
    numbers = np.array([g for shard in groups or [] for g in shard] or np.zeros(len(lengths)), np.uint16)
    names = tuple(f"{i}.tar" for i in range(len(shards)))
    return Catalogue(
        shards=names,
        starts_S=starts,
        length_N=lengths,
        group_N=numbers,
        groups=tuple(Group(f"c{g}", "en") for g in range(n_groups)),
        fingerprint="x",
    )


def with_texts(catalogue: Catalogue, text_N: np.ndarray) -> Catalogue:
    """Returns the catalogue with its segments divided into those with a text and those without."""
    numbers = 2 * catalogue.group_N + text_N
    groups = tuple(group._replace(text=text) for group in catalogue.groups for text in (False, True))
    return replace(catalogue, group_N=numbers.astype(np.uint16), groups=groups)


def random_shards(seed: int, n_shards: int, per_shard: int, low: float = 0.5, high: float = 20.0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [list(rng.uniform(low, high, per_shard)) for _ in range(n_shards)]


def reader_config(**values: object) -> DataConfig:
    return DataConfig(**{"shards": "x", "batch_seconds": 64.0, "micro_batches": 4, **values})  # type: ignore[arg-type]
