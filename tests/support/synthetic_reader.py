"""Global steps without shards: noise with a moving formant, equal on every rank and at every start."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import Batch, Cursor, Step


def synthetic_batch(step: int, micro_batch: int) -> Batch:
    """Returns two clips of noise with a moving formant; the second is shorter."""
    rng = keyed_rng(7, step, micro_batch, "audio")
    time = torch.arange(16000) / 16000
    tones = [torch.sin(2 * torch.pi * rng.uniform(100, 2000) * time * (1 + 0.2 * time)) for _ in range(2)]
    wave_BT = torch.stack(tones) * 0.3 + 0.05 * torch.from_numpy(rng.standard_normal((2, 16000))).float()
    lengths_B = torch.tensor([16000, 12000 - 160 * micro_batch])
    wave_BT[1, lengths_B[1] :] = 0
    return Batch(wave_BT, lengths_B, (f"a{step}-{micro_batch}", f"b{step}-{micro_batch}"), micro_batch)


class SyntheticReader:
    """StepReader with 4 micro-batches per step and 10 steps per epoch."""

    plan_hash = "synthetic"
    micro_batches = 4

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        epoch, step = (cursor.epoch, cursor.step) if cursor else (0, 0)
        while True:
            number = epoch * 10 + step
            batches = [synthetic_batch(number, j) for j in range(self.micro_batches)]
            samples = sum(int(batch.lengths_B.sum()) for batch in batches)
            padded = sum(batch.wave_BT.numel() for batch in batches)
            epoch, step = (epoch + 1, 0) if step == 9 else (epoch, step + 1)
            mine = batches[self.rank :: self.world]
            if len(mine) * self.world < self.micro_batches:
                mine.append(mine[0].emptied(self.micro_batches + self.rank))
            yield Step(tuple(mine), samples, padded, Cursor(self.plan_hash, epoch, step))

    def close(self) -> None:
        """Does nothing: there are no workers."""
