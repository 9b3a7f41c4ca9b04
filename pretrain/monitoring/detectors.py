"""Health detectors: pure functions from measurements to a Finding or None, called by detection.py.

Each threshold is for a known failure of self-supervised pretraining; see HealthConfig.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["nan", "spike", "collapse", "chance", "recipe", "speed"]
"""Kinds of findings. Each selects the `health.on_…` setting that applies; "speed" is always a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem: the measurement and the usual remedy."""

    detector: str
    kind: Kind
    seen: str
    helps: str
    pooled: int = 0
    """Steps before a check over which this was measured: the problem may have begun that much earlier."""

    def sentence(self, since: int) -> str:
        """Returns the message: the measurement, the step since which it holds, and the usual remedy."""
        return f"{self.seen}, since step {since}; what usually helps: {self.helps}"


def entropy(counts: np.ndarray) -> float:
    """Returns the entropy in nats of a distribution given by counts, with Miller and Madow's correction."""
    total = float(counts.sum())
    if total <= 0:
        return 0.0
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum()) + (len(share) - 1) / (2.0 * total)


def gradient_limit(norms: Sequence[float], factor: float, floor: float = 0.0, at_least: int = 20) -> float:
    """Returns the gradient norm above which an update is an outlier: `factor` × the running median.

    Args:
        norms: gradient norms of recent updates.
        factor: multiple of their median.
        floor: the norm that gradients are clipped to. A norm below it is not an outlier: gradient norms grow tenfold
            within ten updates when a run leaves chance level (docs/findings.md).
        at_least: number of updates below which the limit is infinite.
    """
    return max(floor, factor * statistics.median(norms)) if len(norms) >= at_least else math.inf


def gradient_spike(norm: float, limit: float) -> Finding | None:
    """Reports an update with a gradient norm above the limit."""
    if norm <= limit:
        return None
    return Finding(
        "gradient spike",
        "spike",
        f"the gradient norm of one update is {norm:.3g}, above the limit {limit:.3g} from earlier updates",
        "nothing if it stays rare; else a lower optimizer.lr, optimizer.clip_norm, or a look at the saved batch",
    )


def at_chance(loss: float, chance: float, margin: float) -> Finding | None:
    """Reports a loss no better than that of predicting the distribution of the targets."""
    if chance <= 0 or loss < chance * (1.0 - margin):
        return None
    return Finding(
        "chance",
        "chance",
        f"the loss is {loss:.3f}, and chance level is {chance:.3f}",
        "a higher optimizer.lr or a longer warm-up, fewer masked frames, larger updates (data.batch_seconds), and a "
        "check that targets and frames are aligned in time",
    )


def accuracy_at_chance(accuracy: float, chance: float, margin: float = 0.1) -> Finding | None:
    """Reports an accuracy no better than guessing. Ties must not count as correct, or constant predictions would be."""
    if chance <= 0 or accuracy > chance * (1.0 + margin):
        return None
    return Finding(
        "accuracy at chance",
        "chance",
        f"the accuracy is {accuracy:.2%}, and chance level is {chance:.2%}",
        "a higher optimizer.lr, a longer warm-up, or targets that differ between neighbouring frames",
    )


def too_good(loss: float, chance: float, perplexity: float, best_perplexity: float) -> Finding | None:
    """Reports a contrastive loss near zero with falling code use: the task has become trivial.

    Args:
        loss: mean contrastive loss per target.
        chance: loss of guessing.
        perplexity: of the codes now.
        best_perplexity: the highest one so far.
    """
    if not (chance > 0 and loss < 0.05 * chance and perplexity < 0.5 * best_perplexity):
        return None
    return Finding(
        "too good",
        "collapse",
        f"the contrastive loss is {loss:.4f} (chance: {chance:.2f}) while the perplexity fell from "
        f"{best_perplexity:.1f} to {perplexity:.1f}",
        "a larger objective.diversity_weight, a slower Gumbel temperature, and a look for clicks or silences",
    )


def low_code_use(
    counts: np.ndarray, min_share: float, at_least: float = 20.0, what: str = "the targets"
) -> Finding | None:
    """Reports a perplexity of the targets below `min_share` of the K codes (and K^0.6, that of large random books).

    Args:
        counts: (K,) occurrences of each code.
        min_share: least share of the codes.
        at_least: mean count per code below which nothing is reported.
        what: the book, for the message.
    """
    book, total = len(counts), float(counts.sum())
    if book < 2 or total < at_least * min(book, 1000):
        return None
    perplexity = math.exp(entropy(counts))
    limit = min(min_share * book, book**0.6)
    if perplexity >= limit:
        return None
    return Finding(
        "code use",
        "collapse",
        f"{what} use {perplexity:.1f} of {book} codes in effect (limit {limit:.1f})",
        "a larger diversity weight or a slower temperature for learned codes; for fixed ones, features of mean 0 and "
        "deviation 1, or PCA-whitened ones",
    )


def dead_codes(
    counts: np.ndarray, max_share: float, at_least: float = 20.0, what: str = "the targets"
) -> Finding | None:
    """Reports more than `max_share` of unused codes, if the mean count per code is `at_least` or more."""
    book, total = len(counts), float(counts.sum())
    if book < 2 or total < at_least * book:
        return None
    dead = float((counts == 0).mean())
    if dead <= max_share:
        return None
    return Finding(
        "dead codes",
        "chance",
        f"{what} never used {dead:.0%} of {book} codes in {total:.0f} frames",
        "fewer codes, re-seeding dead ones, or a larger diversity weight",
    )


def low_target_entropy(counts: np.ndarray, min_share: float) -> Finding | None:
    """Reports fixed targets with an entropy below `min_share` of the maximum, before training."""
    total = float(counts.sum())
    most = math.log(min(len(counts), total)) if min(len(counts), total) > 1 else 0.0
    if total < 100 or most == 0.0 or entropy(counts) >= min_share * most:
        return None
    return Finding(
        "target entropy",
        "collapse",
        f"the targets' entropy is {entropy(counts):.2f} nats of {most:.2f} possible before any training",
        "normalising the target features to mean 0 and deviation 1, and audio that is not mostly silence",
    )


def off_scale(stage: str, mean: float, deviation: float) -> Finding | None:
    """Reports input of a fixed quantiser far from mean 0 and deviation 1: a few codes would take most frames."""
    if abs(mean) <= 0.5 and 0.5 <= deviation <= 2.0:
        return None
    return Finding(
        "target inputs",
        "collapse",
        f"{stage} have mean {mean:.2g} and deviation {deviation:.2g}, and fixed targets need 0 and 1",
        "normalising them per utterance or over the corpus, and audio that is not mostly digital silence",
    )


def silence_note(silent: int, segments: int, keys: Sequence[str], shown: int = 5) -> str:
    """Returns a sentence with the number of silent or constant segments of an update and the first keys."""
    named = ", ".join(keys[:shown]) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")
    return f"{silent} of {segments} segments of one update are silent or constant" + (f": {named}" if named else "")


def silent_audio(silent: int, segments: int, keys: Sequence[str], max_share: float) -> Finding | None:
    """Reports updates in which more than `max_share` of the segments are silent or constant."""
    if not silent or silent / segments <= max_share:
        return None
    return Finding(
        "silent audio",
        "collapse",
        silence_note(silent, segments, keys),
        "leaving these recordings out (`auricle preprocess` with filter and vad), or repairing them: a channel without "
        "a signal, a failed conversion",
    )


def without_targets(task: str, updates: int) -> Finding:
    """Reports a task that had no target in `updates` updates in a row, so that its loss of 0 is meaningless."""
    if task == "objective":
        helps = (
            "segments that are long enough to be masked (data.min_seconds), and frame labels that belong to these "
            "shards where objective.labels names some"
        )
    else:
        helps = (
            f"the label that heads.{task}.label names among data.labels, shards that have it, symbols of its "
            "alphabet; a larger health.window where few segments have it, or health.on_collapse=warn"
        )
    seen = f"the task {task!r} had no target in {updates} updates in a row: it learns nothing"
    return Finding(f"{task} without targets", "collapse", seen, helps)


def unusable_labels(head: str, unusable: float, labelled: float, max_share: float = 0.5) -> Finding | None:
    """Reports a head that cannot use more than `max_share` of its labelled segments."""
    if not labelled or unusable / labelled <= max_share:
        return None
    return Finding(
        f"{head} labels",
        "recipe",
        f"the head {head!r} cannot use {unusable:.0f} of {labelled:.0f} labelled segments",
        f"for texts that are longer than the frames: a higher frame rate (frontend.subsampling) or larger tokens; for "
        f"labels outside the classes: more classes of heads.{head}",
    )


def shrunken(stage: str, deviation: float, first: float, min_share: float) -> Finding | None:
    """Reports a stage whose output hardly varies over batch and time, below `min_share` of the first deviation."""
    if math.isfinite(deviation) and deviation >= max(min_share * first, 1e-6):
        return None
    return Finding(
        f"{stage} deviation",
        "collapse",
        f"the output of {stage} varies by {deviation:.2g} over batch and time, and by {first:.2g} at the start",
        "a lower learning rate, a smaller frontend.gradient_scale or a longer warm-up; a dead stem never recovers",
    )


def rank_fell(stage: str, rank: float, best: float, min_share: float) -> Finding | None:
    """Reports a RankMe (arXiv 2210.02885) of a stage far below its best value since the warm-up.

    Random weights preserve the rank of their input, 170 of 256 with log-mel, and healthy training lowers it to about
    30, so the first steps are not compared. After the warm-up, healthy runs kept at least 29 % of their best rank, and
    a collapsed one fell to 12 % (docs/findings.md).
    """
    if rank >= min_share * best:
        return None
    return Finding(
        f"{stage} rank",
        "chance",
        f"the effective rank of {stage} is {rank:.1f}, and was {best:.1f} at its best",
        "a lower learning rate, more varied targets, or stopping here and taking an earlier checkpoint",
    )


def falling(name: str, values: Sequence[float], times: int = 3, tolerance: float = 0.0) -> Finding | None:
    """Reports a measure of quality (probe accuracy, PNMI) that fell in `times` evaluations in a row."""
    recent = list(values)[-(times + 1) :]
    if len(recent) <= times or any(later >= earlier - tolerance for earlier, later in itertools.pairwise(recent)):
        return None
    return Finding(
        f"{name} falling",
        "chance",
        f"{name} fell {times} evaluations in a row, from {recent[0]:.3f} to {recent[-1]:.3f}",
        "an earlier checkpoint, a lower learning rate, or less weight on further tasks",
    )


def wrong_audio(seconds: float, recipe: float, tolerance: float) -> Finding | None:
    """Reports updates with less or more audio than the recipe's, for which its learning rate is not optimal."""
    if abs(seconds / recipe - 1.0) <= tolerance:
        return None
    return Finding(
        "audio per update",
        "recipe",
        f"an update sees {seconds:.1f} s of audio on average, and data.batch_seconds={recipe:g}",
        "accumulating data.micro_batches / ranks micro-batches per update, and shards with enough audio",
    )


def waiting_ranks(waits: Mapping[int, float], step_seconds: float, max_share: float) -> Finding | None:
    """Reports ranks that wait for data for a large share of each step. waits: mean seconds per step of each rank."""
    slowest = max(waits, key=lambda rank: waits[rank])
    share = waits[slowest] / step_seconds if step_seconds > 0 else 0.0
    if share <= max_share:
        return None
    return Finding(
        "data wait",
        "speed",
        f"rank {slowest} waits for data {share:.0%} of the time (the ranks' mean: "
        f"{statistics.fmean(waits.values()) / step_seconds:.0%})",
        "a higher data.workers or data.prefetch, and shards or data.cache on a local disk",
    )


def rank_me(x_ND: np.ndarray, eps: float = 1e-7) -> float:
    """Returns exp(entropy) of the singular values of centred features, 1 … D (RankMe, arXiv 2210.02885, eq. 3)."""
    values = np.linalg.svd(x_ND - x_ND.mean(0), compute_uv=False)
    if not values.sum() > 0:
        return 1.0
    share = values / values.sum() + eps
    return float(np.exp(-(share * np.log(share)).sum()))
