"""The plan of an epoch: from indexes, seed and epoch number to global steps of V micro-batches. Pure and deterministic.

An epoch is a sequence of *units* (a shard, or a repeat of a part of it) in shuffled order. Units are grouped into
*windows*; samples are shuffled inside windows only, so a window is planned separately and a resume plans just one:

1. Segments are ordered by length bucket (geometric edges, ratio rho) and at random inside a bucket.
2. That order is cut into K = steps x V micro-batches at equal seconds: nothing is left over and nothing dropped.
3. V neighbours make a global step; steps are shuffled.

Guarantees, for every number of ranks, since the plan does not depend on it:
- The mean audio of a global step is `batch_seconds` to within 2.5 % (all seconds are divided by a whole number of
  steps; an epoch has at least MIN_STEPS steps, by whole repeats of small corpora). A single step differs from the mean
  of its window by less than `max_seconds`, if a micro-batch of the mean size can hold the longest segment.
- A micro-batch inside one bucket has at most 1 - 1/rho padding. Where only few segments of some lengths remain, a
  micro-batch spans buckets (fewer per window than there are buckets); its segments are mostly sorted by length, and
  cropped only if it would exceed the limit of an ordinary one. With `crop_to_shortest` nothing is padded.
- Every segment appears exactly as often as its corpus and language is repeated: once, if `mix_alpha` is 1.
- With `text_share` every step of a window has as much audio with texts, to within a segment or two, and windows have
  that share to within a unit. Segments with a text, or without, are repeated for it. Micro-batches are of one kind.

Only integers and exactly rounded float operations decide, so that all machines agree.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from data_pipeline.core.lru import LruCache
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.constraints import Array, BatchConstraints
from data_pipeline.sampling.epoch import EpochLayout, PlanInputs, lay_out, repeats_of, summarize, with_text_share
from data_pipeline.sampling.window import MicroBatch, Window

VERSION: Final = "plan-1"
"""Part of the hash; increase it when the algorithm changes plans."""
TOLERANCE: Final = 0.05
"""Largest relative difference of the mean audio per step from `batch_seconds` with which training starts."""


class Plan:
    """All epochs of a data set. Layouts and windows are computed on demand; the last few are cached."""

    too_short: int = 0
    """Number of segments that are too short for the model although `min_seconds` permits them."""

    def __init__(self, inputs: PlanInputs) -> None:
        self._inputs = inputs
        self._layouts = LruCache[int, EpochLayout](3)
        self._windows = LruCache[tuple[int, int], Window](2)

    @property
    def catalogue(self) -> Catalogue:
        """The planned segments."""
        return self._inputs.catalogue

    @property
    def constraints(self) -> BatchConstraints:
        """Bucket edges, usable lengths and micro-batch limits."""
        return self._inputs.constraints

    @property
    def seed(self) -> int:
        """Seed of the order, the crops and the augmentation."""
        return self._inputs.seed

    @property
    def repeats_G(self) -> Array:
        """(G,) repeats of each group of the catalogue per pass, in 1/SHARE."""
        return self._inputs.repeats_G

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the sequence of batches: content of the shards, seed, and fields of `data` that shape batches.

        It does not depend on the location of the shards or on how they are read; equal hashes mean equal batches.
        """
        seed, repeats = self.seed, self.repeats_G.tobytes().hex()
        parts = [VERSION, self.catalogue.fingerprint, self.constraints.identity, seed, repeats]
        if self.constraints.text_share:
            text_N = self.catalogue.text_G[np.asarray(self.catalogue.group_N)]
            parts += [self.constraints.text_share, hashlib.sha256(np.packbits(text_N).tobytes()).hexdigest()]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]

    def largest_micro_batch(self) -> int:
        """Returns an upper bound of the padded samples of a micro-batch."""
        constraints = self.constraints
        mean = constraints.worst_step(self._inputs.entries.samples) / constraints.micro_batches * constraints.unevenness
        return int(max(constraints.ordinary_limit(mean), constraints.cap)) + constraints.longest

    def layout(self, epoch: int) -> EpochLayout:
        """Returns the units, windows and step numbers of `epoch`."""
        return self._layouts.get(epoch, lambda: lay_out(self._inputs, epoch))

    def window(self, epoch: int, number: int) -> Window:
        """Returns window `number` of `epoch`, planned from its own shards alone."""
        return self._windows.get((epoch, number), lambda: self.layout(epoch).plan_window(number))

    def place(self, epoch: int, step: int) -> tuple[Window, int]:
        """Returns the window of global step `step`, and the step's number inside it.

        Raises:
            ConfigError: the epoch has fewer steps.
        """
        first_W1 = self.layout(epoch).step_W1
        if not 0 <= step < first_W1[-1]:
            raise ConfigError(f"step {step} is not in epoch {epoch}, which has {first_W1[-1]} steps")
        number = int(first_W1.searchsorted(step, side="right")) - 1
        return self.window(epoch, number), step - int(first_W1[number])

    def step(self, epoch: int, step: int) -> tuple[MicroBatch, ...]:
        """Returns the V micro-batches of a global step. Micro-batch j belongs to rank j mod world."""
        window, inside = self.place(epoch, step)
        return tuple(window.micro_batch(inside, j) for j in range(self.constraints.micro_batches))

    def micro_batch(self, epoch: int, step: int, j: int) -> MicroBatch:
        """Returns micro-batch `j` of a global step."""
        window, inside = self.place(epoch, step)
        return window.micro_batch(inside, j)

    def samples(self, epoch: int, step: int) -> tuple[int, int]:
        """Returns the audio samples of a global step, without and with padding."""
        window, inside = self.place(epoch, step)
        return window.samples(inside), window.padded_samples(inside)


def make_plan(catalogue: Catalogue, config: DataConfig, seed: int, least_samples: int = 0) -> Plan:
    """Returns the plan of `catalogue` under `config`.

    Args:
        catalogue: lengths in samples (16 kHz) and groups (corpus, language) of all segments.
        config: the run's `data`.
        seed: the run's seed.
        least_samples: shortest segment, in samples, that the model can use. Shorter ones that pass `min_seconds` are
            skipped, as if `min_seconds` were raised to it, and are counted in `Plan.too_short`.

    Returns:
        The plan: the micro-batches of every step of every epoch, independent of the number of ranks.

    Raises:
        ConfigError: too little audio for `batch_seconds`, or a micro-batch could exceed the memory cap.
    """
    constraints, raised = BatchConstraints.of(config), ""
    too_short = int(
        np.count_nonzero((catalogue.length_N >= constraints.shortest) & (catalogue.length_N < least_samples))
    )
    if too_short:
        constraints = constraints.with_shortest(least_samples)
        raised = f" ({too_short} segments of less than {least_samples / SAMPLE_RATE:g} s are too short for the model)"
    entries = summarize(catalogue, constraints, grouped=config.mix_alpha != 1 or config.text_share > 0)
    total = entries.samples
    if total * 50 < constraints.batch:
        raise ConfigError(
            f"the {int(catalogue.starts_S[-1])} segments of data.shards={', '.join(config.shards)} hold "
            f"{total / SAMPLE_RATE:.1f} s of audio in segments of at least data.min_seconds={config.min_seconds:g}"
            f"{raised}, less than a fiftieth of data.batch_seconds={config.batch_seconds:g}; "
            "give more data or lower data.batch_seconds"
        )
    constraints.check_cap(total)
    repeats_G = repeats_of(entries, max(1, len(catalogue.groups)), config.mix_alpha)
    if config.text_share:
        repeats_G = with_text_share(repeats_G, entries, catalogue.text_G, config.text_share)
    plan = Plan(PlanInputs(catalogue, constraints, seed, entries, repeats_G))
    plan.too_short = too_short
    return plan


def useful_worlds(micro_batches: int) -> list[int]:
    """Returns the numbers of ranks, ascending, each of which needs fewer rounds for V micro-batches than the last.

    A run works on any number of ranks up to V; one between two of these numbers takes as long as the lower one.
    """
    return sorted({-(-micro_batches // rounds) for rounds in range(1, micro_batches + 1)})


def accumulation(micro_batches: int, world: int) -> int:
    """Returns the rounds of a step: the micro-batches per rank, of which the last may be empty.

    Raises:
        ConfigError: there are more ranks than micro-batches, so that some would never have any.
    """
    if world > micro_batches:
        raise ConfigError(
            f"data.micro_batches={micro_batches} cannot be shared by {world} ranks: run on at most {micro_batches}, or "
            f"raise data.micro_batches to {world} or a multiple of it"
        )
    return -(-micro_batches // world)


@dataclass(frozen=True)
class AudioPerStep:
    """seconds: mean unpadded audio of a global step over the first epoch; configured: `batch_seconds`."""

    seconds: float
    configured: float
    steps: int


def audio_per_step_check(plan: Plan, world: int, slots: int) -> AudioPerStep:
    """Returns the audio of an optimizer update.

    Args:
        plan: the run's plan.
        world: number of ranks.
        slots: accumulation steps per rank of the engine. The plan does not depend on world or slots, so the audio of
            an update is right if and only if world x slots micro-batches, less than one round of which is empty, are
            summed in it.

    Raises:
        ConfigError: the audio per update is not the `batch_seconds` of the recipe.
    """
    if accumulation(plan.constraints.micro_batches, world) != slots:
        raise ConfigError(
            f"{world} ranks x {slots} accumulation steps sum {world * slots} micro-batches per update, "
            f"but data.micro_batches={plan.constraints.micro_batches}; the engine must accumulate "
            f"{accumulation(plan.constraints.micro_batches, world)} steps"
        )
    layout, configured = plan.layout(0), plan.constraints.batch / SAMPLE_RATE
    seconds = layout.samples / layout.steps / SAMPLE_RATE
    if abs(seconds / configured - 1) > TOLERANCE:
        raise ConfigError(
            f"a step would hold {seconds:.1f} s of audio on average, but data.batch_seconds={configured:g}; "
            "give more data, or lower data.batch_seconds"
        )
    return AudioPerStep(seconds, configured, layout.steps)
