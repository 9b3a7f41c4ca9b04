"""Ranking: utterances of the same label by other speakers should be nearest, as in query by example."""

from __future__ import annotations

import numpy as np

from pretrain.evaluate.config import ProbeConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.metrics import Tally, average_precision
from pretrain.evaluate.probe import joined, thinned


def for_choice(train: Labelled, valid: Labelled, config: ProbeConfig) -> Labelled:
    """Returns the utterances that choose the layer: `valid`, or both parts if it has too few speakers.

    Nothing is fitted to `train`, so that both parts are as good.

    Args:
        train: utterances of the training speakers.
        valid: those of the validation speakers.
        config: least number of speakers, and most utterances of both parts.
    """
    if len(np.unique(valid.speaker_N)) >= config.least_speakers:
        return valid
    return thinned(joined(train, valid), config.choice_vectors)


def best_layer(part: Labelled) -> int | None:
    """Returns the layer with the best mean average precision; None if no two speakers have an utterance of a label."""
    tallies = [ranking(part, layer).values() for layer in range(part.x_NLD.shape[1])]
    if not any(count for _, count in tallies[0]):
        return None
    return int(np.argmax([sum(hits for hits, _ in tally) for tally in tallies]))


def ranking(part: Labelled, layer: int) -> Tally:
    """Returns the summed average precision and the number of queries of each speaker.

    Every utterance is a query; the utterances of other speakers are ranked by their cosine with it, after the mean of
    all was subtracted. Queries without an utterance of the same label by another speaker do not count.
    """
    x_ND = part.x_NLD[:, layer].float().numpy()
    x_ND = x_ND - x_ND.mean(0)
    x_ND /= np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-9)
    y_N = part.y_N.numpy()
    sums, counts = np.zeros(len(part.speakers)), np.zeros(len(part.speakers))
    for query in range(len(y_N)):
        others = part.speaker_N != part.speaker_N[query]
        relevant = y_N[others] == y_N[query]
        if not relevant.any():
            continue
        order = np.argsort(-(x_ND[others] @ x_ND[query]), kind="stable")
        sums[part.speaker_N[query]] += average_precision(relevant[order])
        counts[part.speaker_N[query]] += 1
    return {name: (float(s), float(n)) for name, s, n in zip(part.speakers, sums, counts, strict=True)}
