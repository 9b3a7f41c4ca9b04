"""Linear probes: logistic regression on standardised features of one layer or of a weighted sum, to convergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from pretrain.evaluate.config import ProbeConfig
from pretrain.evaluate.features import Labelled

SCALED_VECTORS = 20_000
"""Vectors from which mean, deviation and covariance are computed."""
SHRINKAGE = 1e-6
"""Share of the mean variance that is added to each direction's; directions with less are left out."""


class View(NamedTuple):
    """The input of a probe.

    layers: one, or several with learned weights.  l2: strength of the penalty.  by_layer: accuracy of each layer alone,
    by which they were chosen; empty if there was no choice.
    """

    layers: tuple[int, ...]
    l2: float
    by_layer: tuple[float, ...] = ()


class Scaling:
    """Standardises features by the training vectors, and gives the coordinates in which a probe is fitted.

    Trained features may have half of their variance in one direction (docs/findings.md). In the eigenvectors of the
    covariance, scaled by the curvature of cross-entropy and penalty, L-BFGS needs fewer iterations; the minimum is that
    of the standardised features. With fewer vectors than dimensions the coordinates span the vectors: a penalised
    minimum has no part outside.
    """

    def __init__(self, x_NLD: Tensor) -> None:
        some_NLD = x_NLD[:: max(1, len(x_NLD) // SCALED_VECTORS)].float()
        self.mean_LD, self.deviation_LD = some_NLD.mean(0), some_NLD.std(0, unbiased=False) + 1e-5
        mixed_ND = ((some_NLD - self.mean_LD) / self.deviation_LD).mean(1)
        count, dim = mixed_ND.shape
        wide = count < dim
        square = (mixed_ND @ mixed_ND.T if wide else mixed_ND.T @ mixed_ND).double() / count
        values_R, vectors_R = torch.linalg.eigh(square)
        values_R = values_R.clamp(min=0)
        if wide:
            kept_R = values_R > SHRINKAGE * values_R.mean()
            values_R, vectors_R = values_R[kept_R], vectors_R[:, kept_R]
            vectors_R = mixed_ND.double().T @ vectors_R / (count * values_R).sqrt()
        self.values_R: Tensor = (values_R + SHRINKAGE * values_R.mean()).float()
        self.vectors_DR: Tensor = vectors_R.float()

    def curvature(self, y_N: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
        """Returns about the second derivatives by weights along each eigenvector, (R, C), and by biases, (C,).

        They are those of a probe that knows the frequencies of the classes only.
        """
        share_C = torch.bincount(y_N, minlength=classes) / len(y_N)
        bias_C = (share_C * (1 - share_C)).clamp(min=1e-5)
        return self.values_R[:, None] * bias_C + l2 + 1e-12, bias_C

    def __call__(self, x_NLD: Tensor) -> Tensor:
        """Returns the standardised (L, N, D) features of (N, L, D) features in float32."""
        parts = [(part.float() - self.mean_LD) / self.deviation_LD for part in torch.split(x_NLD, 8192)]
        return torch.cat(parts).transpose(0, 1)


@dataclass(frozen=True)
class Weights:
    """Parameters of a probe on standardised features.

    weight_DC: of the features.  mix_L: weights of the layers before their softmax.
    """

    weight_DC: Tensor
    bias_C: Tensor
    mix_L: Tensor

    def logits(self, x_LND: Tensor) -> Tensor:
        """Returns (N, C) scores of (L, N, D) standardised features."""
        return torch.addmm(self.bias_C, mixed(x_LND, self.mix_L), self.weight_DC)


def mixed(x_LND: Tensor, mix_L: Tensor) -> Tensor:
    """Returns the weighted sum of the layers, (N, D)."""
    return x_LND[0] if len(x_LND) == 1 else torch.einsum("l,lnd->nd", mix_L.softmax(0), x_LND)


@dataclass(frozen=True)
class Probe:
    """A fitted probe of the layers of `view`."""

    view: View
    scaling: Scaling
    weights: Weights

    @torch.inference_mode()
    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Returns the predicted classes, (N,), of (N, L, D) features."""
        chosen = list(self.view.layers)
        parts = [self.weights.logits(self.scaling(part[:, chosen])).argmax(1) for part in torch.split(x_NLD, 8192)]
        classes_N: np.ndarray = torch.cat(parts).numpy()
        return classes_N


def minimise(
    x_LND: Tensor, y_N: Tensor, scaling: Scaling, classes: int, l2: float, config: ProbeConfig, start: Weights | None
) -> Weights:
    """Minimises mean cross-entropy + l2 / 2 · |W|² by L-BFGS, where W applies to the standardised features.

    Args:
        x_LND: standardised training vectors.
        y_N: their classes.
        scaling: coordinates in which it is done.
        classes: number of classes, C.
        l2: strength of the penalty; scikit-learn's `C` is 1 / (l2 · N).
        config: when it ends.
        start: initial weights; None: all 0.
    """
    by_weight_RC, by_bias_C = (curvature.sqrt() for curvature in scaling.curvature(y_N, classes, l2))
    inner_RC = by_weight_RC * (scaling.vectors_DR.T @ start.weight_DC) if start else torch.zeros_like(by_weight_RC)
    inner_C = by_bias_C * start.bias_C if start else torch.zeros(classes)
    mix_L = start.mix_L.clone() if start else torch.zeros(len(x_LND))
    fitted = (inner_RC, inner_C, mix_L) if len(x_LND) > 1 else (inner_RC, inner_C)
    parameters = [one.requires_grad_() for one in fitted]
    solver = torch.optim.LBFGS(
        parameters, max_iter=config.iterations, history_size=20, tolerance_grad=1e-6,
        tolerance_change=config.tolerance, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        weight_DC = scaling.vectors_DR @ (inner_RC / by_weight_RC)
        value = F.cross_entropy(torch.addmm(inner_C / by_bias_C, mixed(x_LND, mix_L), weight_DC), y_N)
        value = value + 0.5 * l2 * weight_DC.square().sum()
        torch.autograd.backward(value)
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    inner_RC, inner_C, mix_L = (one.detach() for one in (inner_RC, inner_C, mix_L))
    return Weights(scaling.vectors_DR @ (inner_RC / by_weight_RC), inner_C / by_bias_C, mix_L)


def fit(train: Labelled, classes: int, view: View, config: ProbeConfig) -> Probe:
    """Fits the probe of one view to convergence; nothing is drawn.

    Args:
        train: (N, L, D) features and labels.
        classes: number of classes.
        view: layers and penalty.
        config: when the fit ends.
    """
    return replace(next(fits(train, classes, view.layers, [view.l2], config)), view=view)


def fits(
    train: Labelled, classes: int, layers: tuple[int, ...], penalties: Sequence[float], config: ProbeConfig
) -> Iterator[Probe]:
    """Yields the probe of each penalty; each fit starts from the weights of the one before.

    Args:
        train: (N, L, D) features and labels to fit.
        classes: number of classes.
        layers: layers of the features that the probe reads.
        penalties: weights of the L2 penalty, from strong to weak.
        config: iterations of the minimiser.
    """
    x_NLD = train.x_NLD[:, list(layers)]
    scaling = Scaling(x_NLD)
    x_LND, weights = scaling(x_NLD), None
    for l2 in penalties:
        weights = minimise(x_LND, train.y_N, scaling=scaling, classes=classes, l2=l2, config=config, start=weights)
        yield Probe(View(layers, l2), scaling, weights)


def fit_probe(
    train: Labelled,
    valid: Labelled,
    classes: int,
    config: ProbeConfig,
    disjoint: bool = True,
    silent: Sequence[int] = (),
) -> Probe:
    """Chooses layers and penalty by the accuracy on speakers that the probes were not fitted to, and fits the probe.

    Those are the validation speakers. Where they are fewer than `config.least_speakers`, the speakers of `train` and
    `valid` are divided into folds, and each fold is judged by probes of the other ones. Layers are chosen with thinned
    vectors. More vectors need a weaker penalty of the mean loss: it is chosen again with all of them, or, after folds,
    divided by their increase.

    Args:
        train: (N, L, D) features and labels to fit.
        valid: those of the validation speakers.
        classes: number of classes.
        config: penalties, folds, and number of vectors.
        disjoint: whether classes can be predicted for unseen speakers, so that speakers may be divided into folds.
        silent: classes that do not count in the accuracy; with silence, a strong penalty looks best, under which rare
            phones are never predicted.
    """
    everything = tuple(range(train.x_NLD.shape[1]))
    selections = [everything, *((layer,) for layer in everything)] if len(everything) > 1 else [everything]
    penalties = sorted(config.l2, reverse=True)
    parts = [
        (some, taken(judge, ~np.isin(judge.y_N.numpy(), list(silent))))
        for some, judge in folds(train, valid, config, disjoint)
    ]
    if len(selections) == len(penalties) == 1:
        return fit(train, classes, View(everything, penalties[0]), config)
    short = replace(config, iterations=max(1, config.iterations // 4))
    found = [best_penalty(parts, classes, layers, penalties, short) for layers in selections]
    best = max(range(len(found)), key=lambda at: found[at].accuracy)
    layers, by_layer = selections[best], tuple(one.accuracy for one in found[1:])
    chosen, (some, judge) = found[best].probe.view.l2, parts[0]
    if len(parts) > 1:
        return fit(train, classes, View(layers, chosen * len(some.y_N) / len(train.y_N), by_layer), config)
    tried = [l2 for l2 in penalties if l2 <= chosen] if len(some.y_N) < len(train.y_N) else [chosen]
    probe = best_penalty([(train, judge)], classes, layers, tried, config).probe
    return replace(probe, view=probe.view._replace(by_layer=by_layer))


class BestPenalty(NamedTuple):
    """The best accuracy over all parts, and the first part's probe with the penalty that has it."""

    accuracy: float
    probe: Probe


def best_penalty(
    parts: Sequence[tuple[Labelled, Labelled]],
    classes: int,
    layers: tuple[int, ...],
    penalties: Sequence[float],
    config: ProbeConfig,
) -> BestPenalty:
    """Finds the penalty with the best accuracy over all parts.

    Penalties are from strong to weak, each fit a start for the next; it ends where the accuracy falls.

    Args:
        parts: pairs of vectors to fit and vectors to judge by.
        classes: number of classes.
        layers: layers of the features that the probes read.
        penalties: weights of the L2 penalty, from strong to weak.
        config: iterations of the minimiser.
    """
    trials = max(1, sum(len(judge.y_N) for _, judge in parts))
    running = [fits(some, classes, layers, penalties, config) for some, _ in parts]
    best: BestPenalty | None = None
    for probes in zip(*running, strict=True):
        hits = [
            int((probe.predict(judge.x_NLD) == judge.y_N.numpy()).sum())
            for probe, (_, judge) in zip(probes, parts, strict=True)
        ]
        accuracy = sum(hits) / trials
        if best is not None and accuracy < best.accuracy:
            break
        if best is None or accuracy > best.accuracy:
            best = BestPenalty(accuracy, probes[0])
    assert best is not None
    return best


def folds(train: Labelled, valid: Labelled, config: ProbeConfig, disjoint: bool) -> Iterator[tuple[Labelled, Labelled]]:
    """Yields (vectors to fit, vectors to judge by); the first are thinned to `config.choice_vectors`.

    Args:
        train: (N, L, D) features and labels to fit.
        valid: those of the validation speakers.
        config: number of folds and vectors.
        disjoint: whether speakers may be divided into folds; otherwise `valid` judges.
    """
    several = len(np.unique(train.speaker_N)) > 1
    if not disjoint or not several or len(np.unique(valid.speaker_N)) >= config.least_speakers:
        yield thinned(train, config.choice_vectors), valid
        return
    both = joined(train, valid)
    speakers = keyed_rng(0, "folds").permutation(len(both.speakers))
    count = min(config.folds, len(speakers))
    for fold in range(count):
        judged_N = np.isin(both.speaker_N, speakers[fold::count])
        yield thinned(taken(both, ~judged_N), config.choice_vectors), taken(both, judged_N)


def joined(one: Labelled, other: Labelled) -> Labelled:
    """Returns the vectors of both parts."""
    names = tuple(dict.fromkeys((*one.speakers, *other.speakers)))
    owners = [np.array([names.index(s) for s in part.speakers])[part.speaker_N] for part in (one, other)]
    x_NLD, y_N = torch.cat([one.x_NLD, other.x_NLD]), torch.cat([one.y_N, other.y_N])
    return Labelled(x_NLD, y_N, np.concatenate(owners), names)


def taken(part: Labelled, chosen_N: np.ndarray) -> Labelled:
    """Returns the chosen vectors, by mask or index."""
    at = torch.from_numpy(np.asarray(chosen_N))
    return replace(part, x_NLD=part.x_NLD[at], y_N=part.y_N[at], speaker_N=part.speaker_N[chosen_N])


def thinned(part: Labelled, most: int) -> Labelled:
    """Returns every n-th vector, at most about `most`."""
    return taken(part, np.arange(0, len(part.y_N), max(1, len(part.y_N) // most)))
