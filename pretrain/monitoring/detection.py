"""Detection: pure functions from measurements to findings, without files or state.

Selects which detectors of detectors.py run on which measurements, and from which step on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config, HealthConfig
from pretrain.monitoring import detectors
from pretrain.monitoring.detectors import Finding
from pretrain.monitoring.observation import Pooled

CAUSED_BY_SILENCE = ("collapse", "chance")
"""Kinds of findings that silent or constant audio can cause."""
TARGETS, PREDICTIONS = "target_std", "prediction_std"
"""Names of these deviations in findings and in the memory of checkpoints."""


@dataclass(frozen=True)
class Silence:
    """Segments of one update that are silent or constant, over all ranks; keys: those of rank 0."""

    silent: int = 0
    segments: int = 0
    keys: tuple[str, ...] = ()


class Deviation(NamedTuple):
    """The standard deviation over batch and time of an output, at this check and at the first one."""

    value: float
    first: float


@dataclass(frozen=True)
class Check:
    """The measurements of one check."""

    step: int
    stages: Mapping[str, Deviation]
    """Of each stage of the model."""
    targets: Deviation | None
    """Deviation of the target vectors, if the objective reports it."""
    predictions: Deviation | None
    """Deviation of the predicted vectors, if the objective reports it."""
    ranks: Mapping[str, float]
    """RankMe of each layer."""
    best: Mapping[str, float]
    """The best rank of each layer since the warm-up, once ranks are checked; the best "perplexity"."""
    evaluations: Mapping[str, Mapping[int, float]]
    """Results of `auricle evaluate`, by name and step."""
    pooled: Pooled
    targets_since: int
    silence: Silence


def before_first_update(
    books: Sequence[np.ndarray], inputs: tuple[float, float] | None, silence: Silence, limits: HealthConfig
) -> list[Finding]:
    """Returns findings on targets that exist before the first update.

    Args:
        books: counts per code of each book; empty if targets are not fixed.
        inputs: mean and deviation of the input of a fixed quantiser of targets.
        silence: segments without sound.
        limits: thresholds.
    """
    found = [detectors.low_target_entropy(counts, limits.min_target_entropy) for counts in books]
    if inputs is not None:
        found.append(detectors.off_scale("the features that targets are computed from", *inputs))
    return explained([seen for seen in found if seen is not None], silence, limits)


def at_check(check: Check, config: Config) -> list[Finding]:
    """Returns all findings of one check after an update."""
    limits, pooled = config.health, check.pooled
    found: list[Finding | None] = []
    found += [detectors.shrunken(name, *stage, limits.min_stage_std) for name, stage in check.stages.items()]
    if check.targets is not None:
        found.append(detectors.shrunken(TARGETS, *check.targets, limits.min_stage_std))
    if check.predictions is not None:
        found.append(detectors.shrunken(PREDICTIONS, *check.predictions, limits.min_prediction_std))
    for name, measured in check.evaluations.items():
        steps = sorted(measured)
        fell = detectors.falling(name, [measured[at] for at in steps])
        # the first of them was the best, and its checkpoint is healthy
        found.append(fell and dataclasses.replace(fell, pooled=max(0, check.step - steps[-4] - limits.every)))
    for name, rank in check.ranks.items():
        if name in check.best:
            found.append(detectors.rank_fell(name, rank, check.best[name], limits.min_rank))
    if pooled.updates >= limits.window:
        seconds = pooled.samples / SAMPLE_RATE
        if not config.data.episodes.label:  # whose audio follows from their rows
            found.append(detectors.wrong_audio(seconds, config.data.batch_seconds, limits.audio_tolerance))
        found += [detectors.unusable_labels(head, *rows) for head, rows in pooled.unusable.items()]
        found.append(detectors.waiting_ranks(pooled.waits, pooled.seconds, limits.max_data_wait))
        if check.step >= check.targets_since + grace(config, check.targets_since):
            learning = _on_learning(pooled, check.best.get("perplexity", 0.0), limits)
            found += [seen and dataclasses.replace(seen, pooled=limits.window) for seen in learning]
    return explained([seen for seen in found if seen is not None], check.silence, limits)


def grace(config: Config, targets_since: int) -> int:
    """Returns the number of steps after new targets in which chance and codes are not checked."""
    return min(config.health.grace_steps, (config.train.steps - targets_since) * 2 // 3)


def ranks_from(config: Config) -> int:
    """Returns the first step at which ranks are checked: after the warm-up, in which they fall in healthy runs too."""
    warm = max(config.schedule.warmup_steps, config.health.window)
    return min(warm, config.train.steps * 2 // 3)


def _on_learning(pooled: Pooled, best_perplexity: float, limits: HealthConfig) -> list[Finding | None]:
    found: list[Finding | None] = [detectors.at_chance(pooled.loss, pooled.chance_loss, limits.chance_margin)]
    if not math.isnan(pooled.chance_accuracy) and not math.isnan(pooled.accuracy):
        found.append(detectors.accuracy_at_chance(pooled.accuracy, pooled.chance_accuracy))
    n = len(pooled.books)
    for number, counts in enumerate(pooled.books, 1):
        what = "the targets" if n == 1 else f"the targets of code book {number} of {n}"
        found.append(detectors.low_code_use(counts, limits.min_perplexity, what=what))
        found.append(detectors.dead_codes(counts, limits.max_dead_codes, what=what))
    if pooled.books and pooled.contrastive:
        perplexity = total_perplexity(pooled.books)
        found.append(detectors.too_good(pooled.loss, pooled.chance_loss, perplexity, best_perplexity))
    return found


def total_perplexity(books: Sequence[np.ndarray]) -> float:
    """Returns the summed perplexity of the books."""
    return sum(math.exp(detectors.entropy(counts)) for counts in books)


def explained(found: list[Finding], silence: Silence, limits: HealthConfig) -> list[Finding]:
    """Adds silent audio as a cause to the findings that it explains.

    Above `max_silent_share`, one finding about the audio replaces them; below, the findings mention it.
    """
    cause = detectors.silent_audio(silence.silent, silence.segments, silence.keys, limits.max_silent_share)
    if cause is not None:
        return [cause, *(seen for seen in found if seen.kind not in CAUSED_BY_SILENCE)]
    if not silence.silent:
        return found
    note = f" ({detectors.silence_note(silence.silent, silence.segments, silence.keys)})"
    return [
        dataclasses.replace(seen, seen=seen.seen + note) if seen.kind in CAUSED_BY_SILENCE else seen for seen in found
    ]
