"""Held-out micro-batches: a fixed choice of segments of a data set, decoded once and kept in memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.audio.augmentation import AugmentConfig
from data_pipeline.core.rng import keyed_hash
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, Batch
from data_pipeline.loader.fetch import SegmentRead, check_labels
from data_pipeline.loader.open_shards import open_files
from data_pipeline.loader.workers import MicroBatches
from data_pipeline.sampling.catalog import Catalogue, load_catalogue
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.constraints import BatchConstraints
from data_pipeline.shards.records import done_records, shard_folders

SEED = 0
"""Keys choice and crops, whatever the run's seed: the losses of several runs are then of the same audio."""


@dataclass(frozen=True)
class HeldOut:
    """The part of the held-out micro-batches that one rank computes."""

    batches: tuple[Batch, ...]
    """As many on every rank, since engines that partition weights compute in lockstep."""
    counted: int
    """Number of micro-batches, from the first, that enter the loss; a rank with too few repeats one."""
    segments: int
    """Over all ranks, like `seconds`."""
    seconds: float


def read_held_out(config: DataConfig, rank: int, world: int, least_samples: int = 0) -> HeldOut:
    """Reads this rank's share of the held-out audio `config.valid`.

    Segments are chosen by a keyed order until `valid_seconds` are reached, sorted by length and packed into
    micro-batches of at most the mean size of training's. Neither depends on the number of ranks.

    Args:
        config: The run's `data`.
        rank: This rank, from 0.
        world: Number of ranks.
        least_samples: Shortest segment, in samples at 16 kHz, that the model can use.

    Returns:
        Micro-batches of (B, T) audio, without augmentation, except for the mixtures of `config.sources`.

    Raises:
        ConfigError: There is no held-out audio of usable length, or a folder of it is also trained on.
        ValueError: Shards are damaged.
    """
    if config.reader == "plan":
        _require_apart(config)
    held_out = dataclasses.replace(
        config,
        shards=config.valid,
        valid=(),
        targets=config.valid_targets,
        augment=_augmentation(config),
        labelled_share=1.0,
    )
    files = open_files(held_out, done_records(config.valid, config.tars))
    try:
        if (bad := files.check()) and config.on_bad_shard == "error":
            raise ValueError(
                f"{len(bad)} of {len(files.records)} shards in data.valid={', '.join(config.valid)} are bad: {bad[0]}"
            )
        catalogue = load_catalogue(files, config.cache, skip_bad=config.on_bad_shard == "skip")
        check_labels(files, config.labels)
        groups = _micro_batches(_choose(catalogue, config, least_samples), config)
        if not groups:
            raise ConfigError(f"data.valid={', '.join(config.valid)}: no segment is long enough to be used")
        reading = MicroBatches(files, held_out)
        mine = groups[rank::world]
        slots = math.ceil(len(groups) / world)
        batches = [reading.assemble(rows, rank + world * number).batch(None, False) for number, rows in enumerate(mine)]
        filler = batches[:1] or [reading.assemble(groups[0], 0).batch(None, False)]
        batches += filler * (slots - len(batches))
    finally:
        files.close()
    rows = [row for group in groups for row in group]
    seconds = sum(row.length for row in rows) / SAMPLE_RATE
    return HeldOut(tuple(batches), len(mine), len(rows), seconds)


def _require_apart(config: DataConfig) -> None:
    """Raises ConfigError if `valid` and `shards` name the same folder, however they are written."""
    trained = {_location(folder): part for part in config.shards for folder in shard_folders(part)}
    for folder in shard_folders(config.valid):
        if (found := trained.get(_location(folder))) is not None:
            raise ConfigError(
                f"data.valid={folder}: is also trained on, by data.shards={found}; held-out audio must not be: name "
                "the folders of data.shards one by one"
            )


def _location(folder: str) -> str:
    store = FileStore(folder)
    return str(Path(store.root).resolve()) if store.local else store.root.rstrip("/")


def _augmentation(config: DataConfig) -> AugmentConfig:
    """Returns what is done to held-out audio: nothing, or the mixtures that a head learns to separate."""
    if not config.sources:
        return AugmentConfig()
    mixing = {field.name for field in dataclasses.fields(AugmentConfig) if field.name.startswith("mix_")}
    return AugmentConfig(**{name: getattr(config.augment, name) for name in mixing})


def _choose(catalogue: Catalogue, config: DataConfig, least_samples: int) -> list[SegmentRead]:
    """Returns the chosen segments, longest first."""
    constraints = BatchConstraints.of(config)
    if least_samples > constraints.shortest:
        constraints = constraints.with_shortest(least_samples)
    length_N = constraints.usable(np.asarray(catalogue.length_N))
    order_N = np.argsort(keyed_hash(SEED, np.arange(len(length_N))), kind="stable")
    order_N = order_N[length_N[order_N] > 0]
    before_N = np.cumsum(length_N[order_N], dtype=np.int64) - length_N[order_N]
    chosen = order_N[before_N < config.valid_seconds * SAMPLE_RATE]
    chosen = chosen[np.argsort(-length_N[chosen].astype(np.int64), kind="stable")]
    shards = np.searchsorted(catalogue.starts_S, chosen, side="right") - 1
    inside = chosen - catalogue.starts_S[shards]
    columns = (shards.tolist(), inside.tolist(), length_N[chosen].tolist())
    return [
        SegmentRead(shard=s, row=r, length=n, repeat=0, epoch=0, seed=SEED) for s, r, n in zip(*columns, strict=True)
    ]


def _micro_batches(rows: list[SegmentRead], config: DataConfig) -> list[list[SegmentRead]]:
    """Packs rows, longest first, into micro-batches whose padded audio is at most training's mean."""
    most = config.batch_seconds / config.micro_batches * SAMPLE_RATE
    groups: list[list[SegmentRead]] = []
    for row in rows:
        if groups and (len(groups[-1]) + 1) * groups[-1][0].length <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
