"""The probe: one scaled layer or a weighted sum of all, then one linear layer. And the supervised reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.keyed_random import keyed_seed
from pretrain.evaluate.config import ProbeConfig, SupervisedConfig
from pretrain.evaluate.encoders import Model
from pretrain.evaluate.features import Labelled

NO_LABEL = -1
SHRINKAGE = 1e-4
"""Added to the variance of each direction, times the mean variance; 1e-4 to 0.1 gave the same (LOG.md)."""


class View(NamedTuple):
    """What a probe sees of the features.  layers: one of them, or all, which it then weights."""

    whiten: bool
    layers: tuple[int, ...]


class Scaling(nn.Module):
    """Features of the layers of a view made comparable, by the statistics of the training part.

    whiten: directions of little variance count as much as the widest ones. Trained features spread over few directions
    (the widest of 256 may hold half of the variance), on which a probe of some hundred updates would spend itself.
    """

    def __init__(self, x_NLD: Tensor, view: View) -> None:
        super().__init__()
        self.view = view
        some = self.seen(x_NLD[:: max(1, len(x_NLD) // 40_000)])
        self.register_buffer("mean_LD", some.mean(0))
        self.mean_LD: Tensor
        if not view.whiten:
            self.register_buffer("scale", 1.0 / (some.std(0) + 1e-4))
        else:
            centred_LND = (some - self.mean_LD).transpose(0, 1).double()
            values_LD, vectors_LDD = torch.linalg.eigh(centred_LND.transpose(1, 2) @ centred_LND / len(some))
            values_LD = values_LD.clamp(min=0) + SHRINKAGE * values_LD.mean(1, keepdim=True)
            # turned back (ZCA), so that layers of one residual stream can still be summed
            whitening_LDD = (vectors_LDD * values_LD[:, None].rsqrt()) @ vectors_LDD.transpose(1, 2)
            self.register_buffer("scale", whitening_LDD.float())
        self.scale: Tensor

    def seen(self, x_NLD: Tensor) -> Tensor:
        """The layers of the view, fp32."""
        return x_NLD[:, list(self.view.layers)].float()

    @torch.no_grad()
    def forward(self, x_NLD: Tensor) -> Tensor:
        """float16 again, as features are kept."""
        centred = (self.seen(part) - self.mean_LD for part in torch.split(x_NLD, 8192))
        if not self.view.whiten:
            return torch.cat([(part * self.scale).half() for part in centred])
        return torch.cat([torch.einsum("nld,lde->nle", part, self.scale).half() for part in centred])


class Linear(nn.Module):
    """(N, L, D) scaled features to (N, classes)."""

    def __init__(self, n_layers: int, dim: int, classes: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(n_layers))
        self.linear = nn.Linear(dim, classes)

    def forward(self, x_NLD: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.einsum("nld,l->nd", x_NLD.float(), self.layer_weights.softmax(0)))
        return out

    @torch.inference_mode()
    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Classes, (N,)."""
        return torch.cat([self(part).argmax(1) for part in torch.split(x_NLD, 8192)]).numpy()


@dataclass(frozen=True)
class Probe:
    """A fitted probe."""

    scaling: Scaling
    linear: Linear

    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Classes of features as an encoder gives them, (N,)."""
        return self.linear.predict(self.scaling(x_NLD))


def choose_view(train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int) -> View:
    """The view that is best on `valid`, fitted to every third vector; for encoders and baselines alike."""
    some = Labelled(train.x_NLD[::3], train.y_N[::3], train.speaker_N[::3], train.speakers)
    everything = tuple(range(train.x_NLD.shape[1]))
    selections = [everything, *((layer,) for layer in everything)] if len(everything) > 1 else [everything]
    # a covariance wants several vectors a dimension
    scalings = (False, True) if len(some.y_N) >= 4 * train.x_NLD.shape[2] else (False,)
    views = [View(whiten, layers) for whiten in scalings for layers in selections]
    scores = [_fit(view, some, valid, classes, config, seed)[0] for view in views]
    return views[int(np.argmax(scores))]


def fit_probe(
    train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int, view: View | None = None
) -> Probe:
    """The epoch that is best on `valid`, with the view that is; the test speakers take no part."""
    view = view or choose_view(train, valid, classes, config, seed)
    return _fit(view, train, valid, classes, config, seed)[1]


def _fit(
    view: View, train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int
) -> tuple[float, Probe]:
    """(accuracy on `valid`, probe)."""
    torch.manual_seed(keyed_seed(seed, "probe"))
    scaling = Scaling(train.x_NLD, view)
    x_NLD, valid_NLD = scaling(train.x_NLD), scaling(valid.x_NLD)
    probe = Linear(x_NLD.shape[1], x_NLD.shape[2], classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = -(-len(train.y_N) // config.batch)
    epochs = max(config.epochs, -(-config.min_updates // per_epoch))
    updates = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    best, best_state = -1.0, probe.state_dict()
    for _ in range(epochs):
        for pick in torch.split(torch.randperm(len(train.y_N)), config.batch):
            loss = F.cross_entropy(probe(x_NLD[pick]), train.y_N[pick])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        score = float((probe.predict(valid_NLD) == valid.y_N.numpy()).mean())
        if score > best:
            best, best_state = score, {name: value.clone() for name, value in probe.state_dict().items()}
    probe.load_state_dict(best_state)
    return best, Probe(scaling, probe)


class Supervised(nn.Module):
    """The encoder and a linear layer on its last frames, all trained."""

    def __init__(self, model: Model, classes: int) -> None:
        super().__init__()
        self.model = model
        self.linear = nn.Linear(model.shape.dim, classes)


Example = tuple[Tensor, Tensor, Tensor]
"""A waveform (T,), which encoder frame each label belongs to (C,), and the labels (C,); one label: the whole mean."""


def fit_supervised(
    model: Model,
    train: Sequence[Example],
    valid: Sequence[Example],
    classes: int,
    config: SupervisedConfig,
    seed: int,
    per_frame: bool,
) -> Callable[[Sequence[Example]], list[np.ndarray]]:
    """Trains from scratch on the labels; returns what names the classes of further examples."""
    torch.manual_seed(keyed_seed(seed, "supervised"))
    net = Supervised(model, classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr)
    rng = np.random.default_rng(seed)
    batches = _batches(train, config.batch_seconds)
    warmup = max(1, min(100, len(batches)))
    updates = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, max(0.02, 1 - done / max(1, updates)))
    )

    def logits(examples: Sequence[Example]) -> list[Tensor]:
        lengths_B = torch.tensor([len(wave) for wave, _, _ in examples])
        wave_BT = nn.utils.rnn.pad_sequence([wave for wave, _, _ in examples], batch_first=True)
        final = net.model(wave_BT, lengths_B).final
        rows = []
        for row, (_, frames, _) in enumerate(examples):
            x_FD = final.x_BFD[row, : max(1, int(final.lengths_B[row]))]
            picked = x_FD[frames.clamp(max=len(x_FD) - 1)] if per_frame else x_FD.mean(0, keepdim=True)
            rows.append(net.linear(picked))
        return rows

    @torch.inference_mode()
    def predict(examples: Sequence[Example]) -> list[np.ndarray]:
        net.eval()
        return [row.argmax(1).numpy() for example in examples for row in logits([example])]

    best, best_state = -1.0, net.state_dict()
    for _ in range(config.epochs):
        net.train()
        for number in rng.permutation(len(batches)):
            chosen = [train[i] for i in batches[number]]
            loss = F.cross_entropy(torch.cat(logits(chosen)), torch.cat([labels for _, _, labels in chosen]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        guesses = np.concatenate(predict(valid))
        score = float((guesses == torch.cat([labels for _, _, labels in valid]).numpy()).mean())
        if score > best:
            best, best_state = score, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(best_state)
    return predict


def _batches(examples: Sequence[Example], seconds: float) -> list[list[int]]:
    """Examples of like length together, up to `seconds` of padded audio."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i][0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(examples[i][0]) > seconds * 16_000:
            batches.append([])
        batches[-1].append(i)
    return batches
