"""Few-shot classification: N classes from K examples each, on frozen features (Vinyals et al. 2016, §4).

An episode draws classes, their support and their queries; no speaker has both where the data has speakers. Two ways to
classify: the nearest mean of the support (prototypes, Snell et al. 2017, arXiv 1703.05175, eq. 2), which is the linear
classifier with weights 2·p and biases −|p|² (eq. 8); and that classifier after a few steps of gradient descent on the
support. The former is the same classifier unadapted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.config import FewShotConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.metrics import Tally

PROTOTYPES, TUNED = "accuracy of prototypes", "accuracy, fine-tuned"
TRIES = 20
"""Draws of the speakers of an episode, until enough classes have support and queries."""


@dataclass(frozen=True)
class Episode:
    """Rows of a Labelled: support_WK of each class in turn, queries_Q and their classes, 0 … W − 1."""

    support_WK: np.ndarray
    queries_Q: np.ndarray
    classes_Q: np.ndarray


def draw(part: Labelled, config: FewShotConfig, shots: int, number: int, seed: int) -> Episode:
    """Draws one episode, keyed by (seed, number).

    Half of the speakers, drawn for each episode, give the queries, and the other half the support. With one speaker, or
    none named, queries are other recordings than the support.

    Args:
        part: labelled recordings.
        config: number of classes and of queries.
        shots: recordings of each class in the support.
        number: of the episode.
        seed: keys the draw.

    Returns:
        Rows of support and queries in `part`.

    Raises:
        ConfigError: fewer classes than `ways` have enough recordings; the message has how many.
    """
    rng = keyed_rng(seed, "episode", shots, number)
    most = 0
    for _ in range(TRIES):
        found = _examples(part, config, shots, rng)
        if len(found) >= config.ways:
            break
        most = max(most, len(found))
    else:
        classes, speakers = len(np.unique(part.y_N.numpy())), len(part.speakers)
        raise ConfigError(
            f"few_shot.ways={config.ways}, few_shot.shots={shots}: only {most} classes have {shots} recordings and one "
            f"more by another speaker; there are {classes} classes, {speakers} speakers and {len(part.y_N)} recordings"
        )
    chosen = [found[index] for index in rng.choice(len(found), config.ways, replace=False)]
    classes_Q = np.concatenate([np.full(len(queries), way) for way, (_, queries) in enumerate(chosen)])
    return Episode(np.stack([given for given, _ in chosen]), np.concatenate([q for _, q in chosen]), classes_Q)


def _examples(
    part: Labelled, config: FewShotConfig, shots: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws support and queries of every class that has enough recordings."""
    y_N, n_speakers = part.y_N.numpy(), len(part.speakers)
    asked_N = np.isin(part.speaker_N, rng.permutation(n_speakers)[: n_speakers // 2])
    found = []
    for label in np.unique(y_N):
        rows = rng.permutation(np.flatnonzero(y_N == label))
        if n_speakers > 1:
            given, queries = rows[~asked_N[rows]][:shots], rows[asked_N[rows]]
        else:
            given, queries = rows[:shots], rows[shots:]
        if len(given) == shots and len(queries):
            found.append((given, queries[: config.queries]))
    return found


def most_shots(part: Labelled, config: FewShotConfig, shots: int) -> int:
    """Returns the largest number of examples, at most `shots`, with which episodes of `part` can be drawn.

    Args:
        part: labelled recordings.
        config: number of classes and of queries.
        shots: examples of each class that are wanted.

    Raises:
        ConfigError: not even one example.
    """
    for fewer in range(shots, 1, -1):
        with contextlib.suppress(ConfigError):
            draw(part, config, fewer, 0, 0)
            return fewer
    draw(part, config, 1, 0, 0)
    return 1


def classify_queries(x_ND: Tensor, episode: Episode, steps: int, rate: float) -> np.ndarray:
    """Returns the classes found for the queries, (Q,).

    Args:
        x_ND: standardised features of all recordings.
        episode: rows of support and queries.
        steps: steps of gradient descent on the support's mean cross-entropy; 0: prototypes.
        rate: their learning rate.
    """
    support_WKD = x_ND[torch.from_numpy(episode.support_WK)]
    prototypes_WD = support_WKD.mean(1)
    weight_WD, bias_W = 2 * prototypes_WD, -prototypes_WD.square().sum(1)
    # scores grow with the number of channels; the mean over them keeps gradient steps comparable
    scale = 1.0 / x_ND.shape[1]
    W, K, _ = support_WKD.shape
    x_SD, onehot_SW = support_WKD.flatten(0, 1), F.one_hot(torch.arange(W).repeat_interleave(K), W).to(x_ND.dtype)
    for _ in range(steps):
        error_SW = ((x_SD @ weight_WD.T + bias_W) * scale).softmax(1) - onehot_SW
        weight_WD = weight_WD - rate * (error_SW.T @ x_SD) / len(x_SD)
        bias_W = bias_W - rate * error_SW.mean(0)
    logits_QW = x_ND[torch.from_numpy(episode.queries_Q)] @ weight_WD.T + bias_W
    found: np.ndarray = logits_QW.argmax(1).numpy()
    return found


def standardised(part: Labelled, layer: int) -> Tensor:
    """Returns the features of a layer with mean 0 and deviation 1 over the recordings, (N, D) float32."""
    x_ND = part.x_NLD[:, layer].float()
    return (x_ND - x_ND.mean(0)) / x_ND.std(0).clamp(min=1e-5)


def hits(
    part: Labelled, layer: int, episodes: Sequence[Episode], steps: int, rate: float
) -> dict[str, tuple[float, float]]:
    """Returns hits and queries of each speaker over episodes.

    Args:
        part: labelled recordings with their features.
        layer: layer of the features to classify.
        episodes: from `draw` of `part`.
        steps: steps of gradient descent, see `classify_queries`.
        rate: their learning rate.
    """
    x_ND = standardised(part, layer)
    right_N, asked_N = np.zeros(len(part.y_N)), np.zeros(len(part.y_N))
    for episode in episodes:
        np.add.at(right_N, episode.queries_Q, classify_queries(x_ND, episode, steps, rate) == episode.classes_Q)
        np.add.at(asked_N, episode.queries_Q, 1.0)
    n = len(part.speakers)
    sums = (np.bincount(part.speaker_N, weights=weights, minlength=n) for weights in (right_N, asked_N))
    return {name: (float(h), float(q)) for name, h, q in zip(part.speakers, *sums, strict=True)}


def tallies(valid: Labelled, test: Labelled, config: FewShotConfig, seed: int = 0) -> dict[str, Tally]:
    """Classifies the episodes of `test`; layer, learning rate and steps are the best ones on episodes of `valid`.

    Args:
        valid: recordings by which settings are chosen, with fewer examples where it has no more.
        test: recordings of other speakers.
        config: sizes of episodes.
        seed: keys the episodes.

    Returns:
        Hits and queries of each speaker, by the name of the measure.

    Raises:
        ConfigError: there are too few classes, recordings or speakers.
    """
    found: dict[str, Tally] = {}
    for shots in config.shots:
        fewer = most_shots(valid, config, shots)
        tuning = [draw(valid, config, fewer, number, seed) for number in range(config.choice_episodes)]

        def score(layer: int, steps: int, rate: float, episodes: Sequence[Episode] = tuple(tuning)) -> float:
            return sum(h for h, _ in hits(valid, layer, episodes, steps, rate).values())

        layer = max(range(valid.x_NLD.shape[1]), key=lambda number: score(number, 0, 0.0))
        tried = [(steps, rate) for steps in range(1, config.steps + 1) for rate in config.rates]
        steps, rate = max(tried, key=lambda pair: score(layer, *pair))
        episodes = [draw(test, config, shots, number, seed + 1) for number in range(config.episodes)]
        ending = f"{config.ways}-way {shots}-shot"
        found[f"{PROTOTYPES}, {ending}"] = hits(test, layer, episodes, 0, 0.0)
        found[f"{TUNED}, {ending}"] = hits(test, layer, episodes, steps, rate)
    return found
