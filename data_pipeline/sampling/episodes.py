"""Episodes: tasks of a few classes with a few examples each, as the micro-batches of a plan (Vinyals et al. 2016, §4).

An episode draws classes, their support and their queries. No speaker has both, unless speakers are the classes: half of
the speakers, drawn for each episode, give the queries, and the other half the support. Draws are keyed by
(seed, step, micro-batch), so that they depend neither on the number of ranks nor on a resume.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from data_pipeline.core.lru import LruCache
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import PART, QUERY, SAMPLE_RATE, SUPPORT, WAY
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.config import DataConfig, EpisodesConfig
from data_pipeline.sampling.constraints import SHARE, Array, BatchConstraints
from data_pipeline.sampling.epoch import EpochLayout, PlanInputs, summarize
from data_pipeline.sampling.plan import Plan
from data_pipeline.sampling.window import MicroBatch, Window

VERSION: Final = "episodes-1"
"""Part of the hash; increase it when the algorithm changes episodes."""
STEPS: Final = 1000
"""Global steps that count as one epoch; episodes have no end."""
FIELD: Final = "data.episodes"
TRIES: Final = 20
"""Draws of the speakers of an episode, until enough classes have support and queries."""


@dataclass(frozen=True)
class Episode:
    """Rows of labelled recordings: support_WK of each class in turn, queries_Q and their classes, 0 … W − 1."""

    support_WK: Array
    queries_Q: Array
    classes_Q: Array


class LabelledRows:
    """N labelled recordings, from which episodes are drawn.

    Args:
        class_N: class of each, as a number; rows below 0 are left out.
        speaker_N: speaker of each, as a number from 0 on.
    """

    def __init__(self, class_N: Array, speaker_N: Array) -> None:
        known_N = np.flatnonzero(class_N >= 0)
        order = known_N[np.argsort(class_N[known_N], kind="stable")]
        classes_C, first_C = np.unique(class_N[order], return_index=True)
        self.rows_C = np.split(order, first_C[1:]) if len(classes_C) else []
        """The rows of each class."""
        self.speaker_N = speaker_N
        self.n_speakers = len(np.unique(speaker_N[known_N]))
        self.n_rows = len(known_N)

    def draw(self, ways: int, shots: int, queries: int, rng: np.random.Generator, field: str = FIELD) -> Episode:
        """Draws an episode.

        With one speaker, queries are other recordings than the support.

        Args:
            ways: classes.
            shots: recordings of each class in the support.
            queries: most further recordings of each class.
            rng: draws.
            field: the field that has the numbers, for the message.

        Raises:
            ConfigError: too few classes have enough recordings; the message has what there is.
        """
        for _ in range(TRIES):
            asks_S = np.zeros(int(self.speaker_N.max(initial=0)) + 1, bool)
            if self.n_speakers > 1:
                asks_S[rng.permutation(len(asks_S))[: len(asks_S) // 2]] = True
            found = []
            for number in rng.permutation(len(self.rows_C)):
                if pair := self._examples(self.rows_C[number], asks_S, shots, queries, rng):
                    found.append(pair)
                if len(found) == ways:
                    return _episode(found)
        raise ConfigError(
            f"{field}.ways={ways}, {field}.shots={shots}: too few classes have {shots} recordings and one more"
            + " by another speaker" * (self.n_speakers > 1)
            + f"; there are {len(self.rows_C)} classes, {self.n_speakers} speakers and {self.n_rows} recordings"
        )

    def _examples(
        self, rows: Array, asks_S: Array, shots: int, queries: int, rng: np.random.Generator
    ) -> tuple[Array, Array] | None:
        """Draws support and queries of one class; None where it has too few recordings."""
        rows = rng.permutation(rows)
        if self.n_speakers > 1:
            asked = asks_S[self.speaker_N[rows]]
            given, others = rows[~asked][:shots], rows[asked]
        else:
            given, others = rows[:shots], rows[shots:]
        return (given, others[:queries]) if len(given) == shots and len(others) else None


def _episode(found: Sequence[tuple[Array, Array]]) -> Episode:
    classes_Q = np.concatenate([np.full(len(queries), way) for way, (_, queries) in enumerate(found)])
    return Episode(np.stack([given for given, _ in found]), np.concatenate([asked for _, asked in found]), classes_Q)


class EpisodePlan(Plan):
    """A plan whose micro-batches are episodes: the rows of the support, class by class, then those of the queries.

    Args:
        inputs: catalogue, constraints and seed.
        config: sizes of episodes.
        classes: class of each segment, "" for segments without one.
        speakers: speaker of each segment.
    """

    def __init__(
        self, inputs: PlanInputs, config: EpisodesConfig, classes: Sequence[str], speakers: Sequence[str]
    ) -> None:
        super().__init__(inputs)
        self._config = config
        self._length_N = self.constraints.usable(np.asarray(self.catalogue.length_N)).astype(np.int64)
        names, class_N = np.unique(np.array(classes, dtype=str), return_inverse=True)
        class_N = np.where((names[class_N] == "") | (self._length_N == 0), -1, class_N)
        if config.label == "speaker":
            speakers = [""] * len(classes)
        _, speaker_N = np.unique(np.array(speakers, dtype=str), return_inverse=True)
        self._rows = LabelledRows(class_N, speaker_N)
        self._labels = hashlib.sha256("\n".join([*classes, *speakers]).encode()).hexdigest()
        self._steps = LruCache[tuple[int, int], tuple[MicroBatch, ...]](4)

    @functools.cached_property
    def hash(self) -> str:
        parts = [VERSION, self.catalogue.fingerprint, self.constraints.identity, self.seed, self._config, self._labels]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]

    def largest_micro_batch(self) -> int:
        config = self._config
        return config.ways * (max(config.shots) + config.queries) * int(self._length_N.max(initial=1))

    def layout(self, epoch: int) -> EpochLayout:
        """Returns an epoch of `STEPS` steps in one window that may read every shard."""
        shards = np.arange(len(self.catalogue.shards))
        per_class = sum(self._config.shots) / len(self._config.shots) + self._config.queries
        mean = float(self._length_N[self._length_N > 0].mean()) if self._length_N.any() else 0.0
        samples = round(mean * self._config.ways * per_class) * self.constraints.micro_batches
        return EpochLayout(
            inputs=self._inputs,
            epoch=epoch,
            shard_U=shards,
            turn_U=np.zeros_like(shards),
            level_U=np.zeros_like(shards),
            extra_TE=np.zeros((1, 0), np.int64),
            window_W1=np.array([0, len(shards)]),
            step_W1=np.array([0, STEPS]),
            samples=samples * STEPS,
        )

    def window(self, epoch: int, number: int) -> Window:
        """Raises ConfigError: episodes are not parts of a shuffled window."""
        raise ConfigError(
            f"data.episodes.label={self._config.label}: micro-batches are episodes, drawn singly; leave it empty to "
            "see how segments would be planned"
        )

    def step(self, epoch: int, step: int) -> tuple[MicroBatch, ...]:
        number = epoch * STEPS + step
        micro_batches = range(self.constraints.micro_batches)
        return self._steps.get((epoch, step), lambda: tuple(self.episode(number, j) for j in micro_batches))

    def micro_batch(self, epoch: int, step: int, j: int) -> MicroBatch:
        return self.step(epoch, step)[j]

    def samples(self, epoch: int, step: int) -> tuple[int, int]:
        episodes = self.step(epoch, step)
        return sum(one.samples for one in episodes), sum(one.padded_samples for one in episodes)

    def episode(self, step: int, micro_batch: int) -> MicroBatch:
        """Returns episode `micro_batch` of global step `step`, counted over all epochs.

        Raises:
            ConfigError: there are too few classes, recordings or speakers.
        """
        config, rng = self._config, keyed_rng(self.seed, step, micro_batch, "episode")
        shots = int(config.shots[rng.integers(len(config.shots))])
        drawn = self._rows.draw(config.ways, shots, config.queries, rng)
        rows_n = np.concatenate([drawn.support_WK.ravel(), drawn.queries_Q])
        ways_n = np.concatenate([np.repeat(np.arange(config.ways), shots), drawn.classes_Q])
        starts_S = self.catalogue.starts_S
        shard_n = np.searchsorted(starts_S, rows_n, side="right") - 1
        parts = (SUPPORT,) * drawn.support_WK.size + (QUERY,) * len(drawn.queries_Q)
        return MicroBatch(
            shard_n=shard_n,
            row_n=rows_n - starts_S[shard_n],
            length_n=self._length_N[rows_n],
            repeat_n=np.full(len(rows_n), step * self.constraints.micro_batches + micro_batch),
            labels={WAY: tuple(map(str, ways_n.tolist())), PART: parts},
        )


def make_episode_plan(
    catalogue: Catalogue,
    config: DataConfig,
    seed: int,
    classes: Sequence[str],
    speakers: Sequence[str],
    least_samples: int = 0,
) -> EpisodePlan:
    """Returns the plan whose micro-batches are the episodes of `config.episodes`.

    Args:
        catalogue: lengths in samples (16 kHz) of all segments.
        config: the run's `data`.
        seed: the run's seed.
        classes: class of each segment, in the catalogue's order; "" for segments without one.
        speakers: speaker of each segment.
        least_samples: shortest segment, in samples, that the model can use; shorter ones are left out.

    Raises:
        ConfigError: there are fewer classes, recordings or speakers than an episode needs; the message has how many.
    """
    constraints = BatchConstraints.of(config)
    if constraints.shortest < least_samples:
        constraints = constraints.with_shortest(least_samples)
    inputs = PlanInputs(catalogue, constraints, seed, summarize(catalogue, constraints, False), np.array([SHARE]))
    plan = EpisodePlan(inputs, config.episodes, classes, speakers)
    try:
        for shots in config.episodes.shots:
            one = EpisodePlan(inputs, replace(config.episodes, shots=(shots,)), classes, speakers)
            one.episode(0, 0)
    except ConfigError as error:
        raise ConfigError(
            f"{error}, of at least {constraints.shortest / SAMPLE_RATE:g} s, with data.episodes.label="
            f"{config.episodes.label}; lower ways or shots, or give more data"
        ) from None
    return plan
