"""Constraints of a plan, in samples: bucket edges, usable lengths, largest micro-batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.sampling.config import DataConfig

Array = npt.NDArray[Any]
MIN_STEPS: Final = 20
"""Least number of steps of an epoch and of a full window, which bounds the rounding of seconds per step."""
SHARE: Final = 4096
"""Repeats of a corpus are multiples of 1/SHARE, so that rounding is the same on all machines."""


@dataclass(frozen=True)
class BatchConstraints:
    """DataConfig in samples: all settings that determine the plan, besides the data and the seed."""

    batch: int
    micro_batches: int
    shortest: int
    longest: int
    ratio: float
    crop: bool
    window: int
    alpha: float
    cap: float
    quadratic: float
    text_share: float = field(default=0.0, repr=False)  # not in `identity`, which must not change

    @staticmethod
    def of(config: DataConfig) -> BatchConstraints:
        """Returns the constraints of a config. Raises ConfigError if no plan can satisfy batch size and memory cap."""
        made = BatchConstraints(
            batch=_samples(config.batch_seconds),
            micro_batches=config.micro_batches,
            shortest=max(1, _samples(config.min_seconds)),
            longest=_samples(config.max_seconds),
            ratio=config.bucket_ratio,
            crop=config.crop_to_shortest,
            window=config.shuffle_window,
            alpha=config.mix_alpha,
            cap=config.cap_seconds * SAMPLE_RATE,
            quadratic=config.cap_quadratic / SAMPLE_RATE,
            text_share=config.text_share,
        )
        if made.longest < made.shortest:
            raise ConfigError(
                f"data.max_seconds={config.max_seconds:g} is below data.min_seconds={config.min_seconds:g}"
            )
        if made.batch < made.micro_batches * made.longest:
            fits = made.batch // made.longest
            remedy = f"data.micro_batches to at most {fits}" if fits else "data.max_seconds"
            raise ConfigError(
                f"data.batch_seconds={config.batch_seconds:g} over data.micro_batches={config.micro_batches} leaves "
                f"{config.batch_seconds / config.micro_batches:.3g} s a micro-batch, less than one segment of "
                f"data.max_seconds={config.max_seconds:g}; raise data.batch_seconds to at least "
                f"{config.micro_batches * config.max_seconds:g} or lower {remedy}"
            )
        return made

    @property
    def identity(self) -> str:
        """All values as text, for the plan's hash, which checkpoints contain, so that the format must not change."""
        return repr(self).replace("BatchConstraints", "Rules", 1)

    @property
    def unevenness(self) -> int:
        """The largest mean size of micro-batches with, or without, texts, in means of all micro-batches."""
        return 2 if self.text_share else 1

    def ordinary_limit(self, mean: float) -> float:
        """Returns the most padded samples of a micro-batch inside one bucket, for `mean` samples per micro-batch."""
        return (mean + self.longest) * (1 if self.crop else self.ratio)

    def padded_limit(self, mean: float) -> float:
        """Returns the most padded samples of a micro-batch that spans buckets: the memory cap or `ordinary_limit`."""
        return self.cap / (1 + self.quadratic * self.longest) if self.cap else self.ordinary_limit(mean)

    def cost(self, padded: float) -> float:
        """Returns the cost of `padded` samples for comparison with the cap, if all segments have the longest length."""
        return padded * (1 + self.quadratic * self.longest)

    def with_shortest(self, samples: int) -> BatchConstraints:
        """Returns the constraints without segments of fewer samples; raises ConfigError if none would remain."""
        if self.longest < samples:
            raise ConfigError(
                f"data.max_seconds={self.longest / SAMPLE_RATE:g} is below the {samples / SAMPLE_RATE:g} s that the "
                "model needs: its front end and masks give shorter audio no target; raise data.max_seconds"
            )
        return replace(self, shortest=samples)

    @functools.cached_property
    def edges(self) -> Array:
        """(B,) ascending lower edges of the buckets; the last bucket contains only the longest length."""
        edges = [self.longest]
        while edges[-1] > self.shortest:
            edges.append(max(self.shortest, min(edges[-1] - 1, int(np.ceil(edges[-1] / self.ratio)))))
        return np.array(edges[::-1], dtype=np.int64)

    def usable(self, length_N: Array) -> Array:
        """Returns the used samples of each segment, (N,): 0 if too short, cropped if too long."""
        used = np.minimum(length_N, np.uint32(self.longest))
        used[length_N < self.shortest] = 0
        if self.crop:
            lower = np.concatenate([[0], self.edges]).astype(np.uint32)
            used = lower[np.searchsorted(self.edges, used, side="right")]
        return used

    def worst_step(self, total: int) -> float:
        """Returns the largest mean samples per step of any window after rounding, for passes of `total` samples."""
        return self.batch * (1 + 1 / max(1, min(MIN_STEPS, total // self.batch)))

    def check_cap(self, total: int) -> None:
        """Raises ConfigError if a micro-batch could exceed the memory cap, for `total` samples of audio."""
        worst = self.worst_step(total)

        def over(micro_batches: int) -> bool:
            return self.cost(self.ordinary_limit(self.unevenness * worst / micro_batches)) > self.cap

        if not self.cap or not over(self.micro_batches):
            return
        most = self.batch // self.longest
        fits = next((v for v in range(self.micro_batches, most + 1) if not over(v)), 0)
        seconds = self.cost(self.ordinary_limit(self.unevenness * worst / self.micro_batches)) / SAMPLE_RATE
        raise ConfigError(
            f"data.cap_seconds={self.cap / SAMPLE_RATE:g} is less than the {seconds:.4g} s that a micro-batch can "
            f"reach with data.batch_seconds={self.batch / SAMPLE_RATE:g} over data.micro_batches="
            f"{self.micro_batches}; " + (f"raise data.micro_batches to {fits}" if fits else "lower data.max_seconds")
        )


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)
