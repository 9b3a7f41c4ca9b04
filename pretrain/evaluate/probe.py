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
"""Vectors from which mean, deviation and whitening are computed."""
SHRINKAGE = 1e-6
"""Share of the mean variance that is added to each direction's before coordinates are whitened."""


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

    Trained features may have half of their variance in one direction (docs/findings.md). In whitened coordinates
    L-BFGS needs fewer iterations; the minimum is that of the standardised features, since the penalty is theirs. With
    fewer vectors than dimensions the coordinates span the vectors: a penalised minimum has no part outside.
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
        self.whitening_DR = (vectors_R * (values_R + SHRINKAGE * values_R.mean() + 1e-12).rsqrt()).float()

    def __call__(self, x_NLD: Tensor) -> Tensor:
        """Returns the whitened (L, N, R) coordinates of (N, L, D) features in float32."""
        parts = [((part.float() - self.mean_LD) / self.deviation_LD) for part in torch.split(x_NLD, 8192)]
        return torch.cat([(part @ self.whitening_DR).transpose(0, 1) for part in parts], dim=1)


@dataclass(frozen=True)
class Weights:
    """Parameters of a probe in whitened coordinates.  mix_L: weights of the layers before their softmax."""

    weight_RC: Tensor
    bias_C: Tensor
    mix_L: Tensor

    def logits(self, z_LND: Tensor) -> Tensor:
        """Returns (N, C) scores of (L, N, D) coordinates."""
        z_ND = z_LND[0] if len(z_LND) == 1 else torch.einsum("l,lnd->nd", self.mix_L.softmax(0), z_LND)
        return torch.addmm(self.bias_C, z_ND, self.weight_RC)


@dataclass(frozen=True)
class Probe:
    """A fitted probe of some layers."""

    layers: tuple[int, ...]
    scaling: Scaling
    weights: Weights

    @torch.inference_mode()
    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Returns the predicted classes, (N,), of (N, L, D) features."""
        chosen = list(self.layers)
        parts = [self.weights.logits(self.scaling(part[:, chosen])).argmax(1) for part in torch.split(x_NLD, 8192)]
        classes_N: np.ndarray = torch.cat(parts).numpy()
        return classes_N


def minimise(
    z_LND: Tensor, y_N: Tensor, whitening_DR: Tensor, classes: int, l2: float, iterations: int, start: Weights | None
) -> Weights:
    """Minimises mean cross-entropy + l2 / 2 · |W|² by L-BFGS, where W applies to the standardised features.

    Args:
        z_LND: whitened coordinates of the training vectors.
        y_N: their classes.
        whitening_DR: from standardised features to these coordinates.
        classes: number of classes, C.
        l2: strength of the penalty; scikit-learn's `C` is 1 / (l2 · N).
        iterations: the most iterations.
        start: initial weights; None: all 0.
    """
    start = start or Weights(torch.zeros(z_LND.shape[2], classes), torch.zeros(classes), torch.zeros(len(z_LND)))
    found = Weights(*(one.clone().requires_grad_() for one in (start.weight_RC, start.bias_C, start.mix_L)))
    parameters = [found.weight_RC, found.bias_C, *([found.mix_L] if len(z_LND) > 1 else [])]
    solver = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(found.logits(z_LND), y_N)
        value = value + 0.5 * l2 * (whitening_DR @ found.weight_RC).square().sum()
        torch.autograd.backward(value)
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return Weights(*(one.detach() for one in (found.weight_RC, found.bias_C, found.mix_L)))


def fit(train: Labelled, classes: int, view: View, config: ProbeConfig, start: Probe | None = None) -> Probe:
    """Fits the probe of one view to convergence; nothing is drawn.

    Args:
        train: (N, L, D) features and labels.
        classes: number of classes.
        view: layers and penalty.
        config: limit of the iterations.
        start: a probe of the same layers and vectors, from which the fit goes on.
    """
    scaling = start.scaling if start else Scaling(train.x_NLD[:, list(view.layers)])
    z_LND = scaling(train.x_NLD[:, list(view.layers)])
    weights = minimise(
        z_LND,
        train.y_N,
        scaling.whitening_DR,
        classes=classes,
        l2=view.l2,
        iterations=config.iterations,
        start=start.weights if start else None,
    )
    return Probe(view.layers, scaling, weights)


def fit_probe(
    train: Labelled,
    valid: Labelled,
    classes: int,
    config: ProbeConfig,
    view: View | None = None,
    disjoint: bool = True,
) -> Probe:
    """Fits a probe to `train`; see `choose_view` for the arguments. view: layers and penalty; None: chosen."""
    return fit(train, classes, view or choose_view(train, valid, classes, config, disjoint), config)


def choose_view(train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, disjoint: bool = True) -> View:
    """Chooses the layers, then the penalty, by the accuracy on speakers that the probes were not fitted to.

    Those are the validation speakers. Where they are fewer than `config.least_speakers`, the speakers of `train` and
    `valid` are divided into folds, and each fold is judged by probes of the other ones.

    Args:
        train: (N, L, D) features and labels to fit.
        valid: those of the validation speakers.
        classes: number of classes.
        config: penalties, folds, and number of vectors.
        disjoint: whether classes can be told on unseen speakers, so that speakers may be divided into folds.
    """
    everything = tuple(range(train.x_NLD.shape[1]))
    selections = [everything, *((layer,) for layer in everything)] if len(everything) > 1 else [everything]
    penalties = sorted(config.l2, reverse=True)
    middle = penalties[len(penalties) // 2]
    parts = list(folds(train, valid, config, disjoint))
    layers, by_layer = selections[0], tuple[float, ...]()
    if len(selections) > 1:
        scores = [accuracies(parts, classes, layers, [middle], config)[0] for layers in selections]
        layers, by_layer = selections[int(np.argmax(scores))], tuple(scores[1:])
    if len(penalties) == 1:
        return View(layers, middle, by_layer)
    best = int(np.argmax(accuracies(parts, classes, layers, penalties, config)))
    return View(layers, penalties[best], by_layer)


def accuracies(
    parts: Sequence[tuple[Labelled, Labelled]],
    classes: int,
    layers: tuple[int, ...],
    penalties: Sequence[float],
    config: ProbeConfig,
) -> list[float]:
    """Returns the accuracy with each penalty over all parts, (vectors to fit, vectors to judge by)."""
    hits, trials = np.zeros(len(penalties)), sum(len(judge.y_N) for _, judge in parts)
    for some, judge in parts:
        probe: Probe | None = None
        for number, l2 in enumerate(penalties):  # from the strongest, each a start for the next
            probe = fit(some, classes, View(layers, l2), config, probe)
            hits[number] += (probe.predict(judge.x_NLD) == judge.y_N.numpy()).sum()
    return [float(share) for share in hits / max(1, trials)]


def folds(train: Labelled, valid: Labelled, config: ProbeConfig, disjoint: bool) -> Iterator[tuple[Labelled, Labelled]]:
    """Yields (vectors to fit, vectors to judge by); the first are thinned to `config.choice_vectors`."""
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
