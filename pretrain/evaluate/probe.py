"""Linear probes on one scaled layer or a weighted sum of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from pretrain.evaluate.config import ProbeConfig
from pretrain.evaluate.features import Labelled

SHRINKAGE = 1e-4
"""Share of the mean variance that is added to each direction's; 1e-4 to 0.1 gave equal results (docs/findings.md)."""


class View(NamedTuple):
    """The input of a probe.  whiten: see `Scaling`.  layers: one, or several with learned weights."""

    whiten: bool
    layers: tuple[int, ...]


class Scaling(nn.Module):
    """Scales the features of every layer by the statistics of the training split.

    whiten: scale all directions to equal variance. The widest of 256 directions of trained features may hold half of
    the variance, and a probe of some hundred updates would fit little else.
    """

    def __init__(self, x_NLD: Tensor, whiten: bool) -> None:
        super().__init__()
        self.whiten = whiten
        some = x_NLD[:: max(1, len(x_NLD) // 40_000)].float()
        self.register_buffer("mean_LD", some.mean(0))
        self.mean_LD: Tensor
        if not whiten:
            self.register_buffer("scale", 1.0 / (some.std(0) + 1e-4))
        else:
            centred_LND = (some - self.mean_LD).transpose(0, 1).double()
            values_LD, vectors_LDD = torch.linalg.eigh(centred_LND.transpose(1, 2) @ centred_LND / len(some))
            values_LD = values_LD.clamp(min=0) + SHRINKAGE * values_LD.mean(1, keepdim=True)
            # rotated back (ZCA), so that layers of one residual stream can still be summed
            whitening_LDD = (vectors_LDD * values_LD[:, None].rsqrt()) @ vectors_LDD.transpose(1, 2)
            self.register_buffer("scale", whitening_LDD.float())
        self.scale: Tensor

    @torch.no_grad()
    def forward(self, x_NLD: Tensor) -> Tensor:
        """Returns the scaled (N, L, D) features in float16."""
        centred = (part.float() - self.mean_LD for part in torch.split(x_NLD, 8192))
        if not self.whiten:
            return torch.cat([(part * self.scale).half() for part in centred])
        return torch.cat([torch.einsum("nld,lde->nle", part, self.scale).half() for part in centred])


class Linears(nn.Module):
    """V linear probes that are fitted together, each on a selection of layers: (N, L, D) to (V, N, classes)."""

    def __init__(self, selections: Sequence[tuple[int, ...]], n_layers: int, dim: int, classes: int) -> None:
        super().__init__()
        drawn = nn.Linear(dim, classes)
        self.weight_VCD = nn.Parameter(drawn.weight.detach().repeat(len(selections), 1, 1))
        self.bias_VC = nn.Parameter(drawn.bias.detach().repeat(len(selections), 1))
        self.layer_weights_VL = nn.Parameter(torch.zeros(len(selections), n_layers))
        outside = [[0.0 if layer in chosen else float("-inf") for layer in range(n_layers)] for chosen in selections]
        self.register_buffer("outside_VL", torch.tensor(outside))
        self.outside_VL: Tensor

    def forward(self, x_NLD: Tensor) -> Tensor:
        mix_VL = (self.layer_weights_VL + self.outside_VL).softmax(1)
        x_VND = torch.einsum("nld,vl->vnd", x_NLD.float(), mix_VL)
        return torch.baddbmm(self.bias_VC[:, None], x_VND, self.weight_VCD.transpose(1, 2))

    @torch.inference_mode()
    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Returns the predicted classes of (N, L, D) features, (V, N)."""
        classes_VN: np.ndarray = torch.cat([self(part).argmax(2) for part in torch.split(x_NLD, 8192)], dim=1).numpy()
        return classes_VN


@dataclass(frozen=True)
class Probe:
    """A fitted probe of some layers."""

    layers: tuple[int, ...]
    scaling: Scaling
    linear: Linears

    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Returns the predicted classes, (N,), of (N, L, D) features."""
        guesses_N: np.ndarray = self.linear.predict(self.scaling(x_NLD[:, list(self.layers)]))[0]
        return guesses_N


def choose_view(train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int) -> View:
    """Chooses scaling and layers of the probe by the accuracy on `valid`, with probes fitted to every third vector.

    Args:
        train: (N, L, D) features and labels to fit.
        valid: those of the validation speakers.
        classes: number of classes.
        config: settings of the optimiser.
        seed: seed of the initial weights and of the order of vectors.
    """
    some = Labelled(train.x_NLD[::3], train.y_N[::3], train.speaker_N[::3], train.speakers)
    everything = tuple(range(train.x_NLD.shape[1]))
    selections = [everything, *((layer,) for layer in everything)] if len(everything) > 1 else [everything]
    # a covariance needs several vectors per dimension
    scalings = (False, True) if len(some.y_N) >= 4 * train.x_NLD.shape[2] else (False,)
    scores = np.stack([_fit(whiten, selections, some, valid, classes, config, seed)[2] for whiten in scalings])
    best = int(scores.argmax())
    return View(scalings[best // len(selections)], selections[best % len(selections)])


def fit_probe(
    train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int, view: View | None = None
) -> Probe:
    """Fits a probe; view and epoch are chosen by the accuracy on `valid`.

    Args:
        train: (N, L, D) features and labels to fit.
        valid: those of the validation speakers.
        classes: number of classes.
        config: settings of the optimiser.
        seed: seed of the initial weights and of the order of vectors.
        view: scaling and layers; None: see `choose_view`.
    """
    view = view or choose_view(train, valid, classes, config, seed)
    train, valid = (replace(part, x_NLD=part.x_NLD[:, list(view.layers)]) for part in (train, valid))
    scaling, linear, _ = _fit(view.whiten, [tuple(range(len(view.layers)))], train, valid, classes, config, seed)
    return Probe(view.layers, scaling, linear)


def _fit(
    whiten: bool,
    selections: Sequence[tuple[int, ...]],
    train: Labelled,
    valid: Labelled,
    classes: int,
    config: ProbeConfig,
    seed: int,
) -> tuple[Scaling, Linears, np.ndarray]:
    """Returns the probes of the epoch with the best mean accuracy on `valid`, and the best accuracy of each."""
    torch.manual_seed(keyed_seed(seed, "probe"))
    scaling = Scaling(train.x_NLD, whiten)
    x_NLD, valid_NLD = scaling(train.x_NLD), scaling(valid.x_NLD)
    probes = Linears(selections, x_NLD.shape[1], x_NLD.shape[2], classes)
    optimizer = torch.optim.AdamW(probes.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = -(-len(train.y_N) // config.batch)
    epochs = max(config.epochs, -(-config.min_updates // per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    best, best_V, best_state = -1.0, np.zeros(len(selections)), probes.state_dict()
    for _ in range(epochs):
        for pick in torch.split(torch.randperm(len(train.y_N)), config.batch):
            logits_VNC, y_N = probes(x_NLD[pick]), train.y_N[pick]
            # the sum of the probes' mean losses, so that probes do not influence each other
            loss = len(selections) * F.cross_entropy(logits_VNC.flatten(0, 1), y_N.repeat(len(selections)))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        score_V = (probes.predict(valid_NLD) == valid.y_N.numpy()).mean(1)
        if score_V.mean() > best:
            best, best_state = score_V.mean(), {name: value.clone() for name, value in probes.state_dict().items()}
        best_V = np.maximum(best_V, score_V)
    probes.load_state_dict(best_state)
    return scaling, probes, best_V
