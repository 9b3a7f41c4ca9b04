"""Few-shot classification: N classes from K examples each, on frozen features (Vinyals et al. 2016, §4).

An episode draws classes, their support and their queries; no speaker has both where the data has speakers. Two ways to
classify: the nearest mean of the support (prototypes, Snell et al. 2017, arXiv 1703.05175, eq. 2), which is the linear
classifier with weights 2·p and biases −|p|² (eq. 8); and that classifier after a few steps of gradient descent on the
support. The former is the same classifier unadapted. A run with engine.name=meta adds its own projection and rates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.episodes import Episode, LabelledRows
from pretrain.config import Config
from pretrain.evaluate.config import FewShotConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.metrics import Tally
from pretrain.heads.episode import EpisodeClassifier, prototypes
from pretrain.train_module import TrainModule

PROTOTYPES, TUNED = "accuracy of prototypes", "accuracy, fine-tuned"
LEARNED, UNADAPTED = "accuracy, meta-learned", "accuracy, meta-learned, unadapted"


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
        ConfigError: fewer classes than `ways` have enough recordings; the message has how many there are.
    """
    rng = keyed_rng(seed, "episode", shots, number)
    rows = LabelledRows(part.y_N.numpy(), part.speaker_N)
    return rows.draw(config.ways, shots, config.queries, rng, "few_shot")


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
    # scores grow with the number of channels; the mean over them keeps gradient steps comparable
    channels = x_ND.shape[1]
    return descend(x_ND / channels**0.5, episode, [rate] * steps, [rate / channels] * steps)


def descend(x_ND: Tensor, episode: Episode, weight_rates: Sequence[float], bias_rates: Sequence[float]) -> np.ndarray:
    """Returns the classes found for the queries, (Q,), by the linear classifier of prototypes after gradient descent.

    Args:
        x_ND: vectors of all recordings.
        episode: rows of support and queries.
        weight_rates: learning rate of the weights in each step.
        bias_rates: that of the biases.
    """
    support_WKD = x_ND[torch.from_numpy(episode.support_WK)]
    W, K, _ = support_WKD.shape
    x_SD, ways_S = support_WKD.flatten(0, 1), torch.arange(W).repeat_interleave(K)
    weight_WD, bias_W = prototypes(x_SD, ways_S, W)
    onehot_SW = F.one_hot(ways_S, W).to(x_ND.dtype)
    for weight_rate, bias_rate in zip(weight_rates, bias_rates, strict=True):
        error_SW = (x_SD @ weight_WD.T + bias_W).softmax(1) - onehot_SW
        weight_WD = weight_WD - weight_rate * (error_SW.T @ x_SD) / len(x_SD)
        bias_W = bias_W - bias_rate * error_SW.mean(0)
    logits_QW = x_ND[torch.from_numpy(episode.queries_Q)] @ weight_WD.T + bias_W
    found: np.ndarray = logits_QW.argmax(1).numpy()
    return found


def standardised(x_ND: Tensor) -> Tensor:
    """Returns features with mean 0 and deviation 1 over the recordings, (N, D) float32."""
    x_ND = x_ND.float()
    return (x_ND - x_ND.mean(0)) / x_ND.std(0).clamp(min=1e-5)


def hits(
    part: Labelled, episodes: Sequence[Episode], found: Callable[[Episode], np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Returns hits and queries of each speaker over episodes.

    Args:
        part: labelled recordings.
        episodes: from `draw` of `part`.
        found: returns the classes found for the queries of an episode, (Q,).
    """
    right_N, asked_N = np.zeros(len(part.y_N)), np.zeros(len(part.y_N))
    for episode in episodes:
        np.add.at(right_N, episode.queries_Q, found(episode) == episode.classes_Q)
        np.add.at(asked_N, episode.queries_Q, 1.0)
    n = len(part.speakers)
    sums = (np.bincount(part.speaker_N, weights=weights, minlength=n) for weights in (right_N, asked_N))
    return {name: (float(h), float(q)) for name, h, q in zip(part.speakers, *sums, strict=True)}


def tallies(
    valid: Labelled, test: Labelled, config: FewShotConfig, seed: int = 0, learner: EpisodeLearner | None = None
) -> dict[str, Tally]:
    """Classifies the episodes of `test`; layer, learning rate and steps are the best ones on episodes of `valid`.

    Args:
        valid: recordings by which settings are chosen, with fewer examples where it has no more.
        test: recordings of other speakers.
        config: sizes of episodes.
        seed: keys the episodes.
        learner: start and rates that meta-learning found, which choose nothing by `valid`.

    Returns:
        Hits and queries of each speaker, by the name of the measure.

    Raises:
        ConfigError: there are too few classes, recordings or speakers.
    """
    found: dict[str, Tally] = {}
    for shots in config.shots:
        fewer = most_shots(valid, config, shots)
        tuning = [draw(valid, config, fewer, number, seed) for number in range(config.choice_episodes)]

        def by_layer(part: Labelled, layer: int, steps: int, rate: float) -> Callable[[Episode], np.ndarray]:
            x_ND = standardised(part.x_NLD[:, layer])
            return lambda episode: classify_queries(x_ND, episode, steps, rate)

        def score(layer: int, steps: int, rate: float, episodes: Sequence[Episode] = tuple(tuning)) -> float:
            return sum(h for h, _ in hits(valid, episodes, by_layer(valid, layer, steps, rate)).values())

        layer = max(range(valid.x_NLD.shape[1]), key=lambda number: score(number, 0, 0.0))
        tried = [(steps, rate) for steps in range(1, config.steps + 1) for rate in config.rates]
        steps, rate = max(tried, key=lambda pair: score(layer, *pair))
        episodes = [draw(test, config, shots, number, seed + 1) for number in range(config.episodes)]
        ending = f"{config.ways}-way {shots}-shot"
        found[f"{PROTOTYPES}, {ending}"] = hits(test, episodes, by_layer(test, layer, 0, 0.0))
        found[f"{TUNED}, {ending}"] = hits(test, episodes, by_layer(test, layer, steps, rate))
        if learner is not None:
            embedded_ND = learner.embed(test.x_NLD)
            for name, adapted in ((LEARNED, learner.adapted), (UNADAPTED, learner.unadapted)):
                found[f"{name}, {ending}"] = hits(test, episodes, functools.partial(adapted, embedded_ND))
    return found


@dataclass(frozen=True)
class EpisodeLearner:
    """What a run with `engine.name=meta` learned for new classes.  rates: in each inner step."""

    head: EpisodeClassifier
    weight_rates: Sequence[float]
    bias_rates: Sequence[float]

    @torch.inference_mode()
    def embed(self, x_NLD: Tensor) -> Tensor:
        """Returns what is classified, (N, P), of the pooled frames of all layers, (N, L, P).

        Rows are standardised over these recordings, as for the other ways, instead of those of the training.
        """
        return self.head.embed(standardised(self.head.mix(tuple(x_NLD.float().unbind(1)))))

    def adapted(self, embedded_ND: Tensor, episode: Episode) -> np.ndarray:
        """Returns the classes found for the queries, (Q,), after the inner steps at the learned rates."""
        return descend(embedded_ND, episode, self.weight_rates, self.bias_rates)

    def unadapted(self, embedded_ND: Tensor, episode: Episode) -> np.ndarray:
        """Returns the classes found for the queries, (Q,), by the weights before the inner steps."""
        return descend(embedded_ND, episode, (), ())


def learner_of(module: TrainModule, config: Config) -> EpisodeLearner | None:
    """Returns what a run learned for new classes; None unless its inner loop adapts the classes of a head `episode`.

    Args:
        module: the run's, loaded.
        config: the run's config.
    """
    rates, name = module.inner_rates, config.engine.meta.inner
    head = dict(module.heads.items()).get(name)
    classes = [f"heads.{name}.classes.{part}" for part in ("weight", "bias")]
    if rates is None or not isinstance(head, EpisodeClassifier) or sorted(rates.names) != sorted(classes):
        return None
    with torch.inference_mode():
        by_name = rates()
    return EpisodeLearner(head.eval(), *(by_name[part].tolist() for part in classes))
