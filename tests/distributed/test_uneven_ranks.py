"""Ranks come and go, 8, then 7, then 8, simulated in one process: the micro-batches and losses of one rank."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.types import Batch, Cursor
from data_pipeline.loader.reader import open_reader
from data_pipeline.sampling.config import DataConfig
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import build_model
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import config

WORLDS = ((8, 7), (7, 7), (8, 6))
"""Ranks, and how many of the 20 updates they run."""


def micro_batches(
    shards: Path, rank: int, world: int, steps: int, cursor: Cursor | None
) -> tuple[list[list[Batch]], Cursor]:
    """Returns those of one rank for some updates after a cursor, and the cursor after them."""
    limits = {"batch_seconds": 16.0, "micro_batches": 8, "min_seconds": 0.3, "max_seconds": 1.6}
    reader = open_reader(DataConfig(shards=str(shards), workers=0, **limits), 7, rank, world)  # type: ignore[arg-type]
    read = list(itertools.islice(reader.steps(cursor), steps))
    reader.close()
    return [list(step.batches) for step in read], read[-1].after


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_eight_then_seven_then_eight_ranks_have_the_losses_of_one(tmp_path: Path, dropout: float) -> None:
    lengths = np.random.default_rng(0).uniform(0.4, 1.5, 300).tolist()
    shards = write_shards(tmp_path, [sounds(lengths)])
    encoder = {
        "name": "transformer",
        "layers": 2,
        "dim": 32,
        "heads": 2,
        "ffn_dim": 64,
        "dropout": dropout,
        "layer_drop": 0.2,
    }
    settings = config(20, encoder=encoder)
    alone, many = (make_engine(settings, build_model(settings), DistributedContext()) for _ in range(2))
    expected, _ = micro_batches(shards, 0, 1, 20, None)
    update, cursor = 0, None
    for world, steps in WORLDS:
        ranks = [micro_batches(shards, rank, world, steps, cursor) for rank in range(world)]
        assert len({after for _, after in ranks}) == 1
        cursor = ranks[0][1]
        for number in range(steps):
            held = [read[number] for read, _ in ranks]
            assert len({len(batches) for batches in held}) == 1, "every rank runs as many passes"
            real = [batch for batches in held for batch in batches if not batch.is_empty]
            assert sorted(batch.micro_batch for batch in real) == list(range(8))
            by_index = {batch.micro_batch: batch.keys for batch in expected[update]}
            assert {batch.micro_batch: batch.keys for batch in real} == by_index
            ctx = StepContext(3, update)
            one = alone.step(expected[update], ctx, 1e-3)
            other = many.step([batch for batches in held for batch in batches], ctx, 1e-3)
            assert other.loss == pytest.approx(one.loss, rel=1e-6)
            update += 1
    assert update == 20
