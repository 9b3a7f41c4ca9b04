"""The probe: one scaled layer or a weighted sum of all, then one linear layer. And the supervised reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from pretrain.evaluate.config import ProbeConfig, SupervisedConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.frozen_encoders import Model

NO_LABEL = -1
SHRINKAGE = 1e-4
"""Added to the variance of each direction, times the mean variance; 1e-4 to 0.1 gave the same (LOG.md)."""


class View(NamedTuple):
    """What a probe sees of the features.  layers: one of them, or several, which it then weights."""

    whiten: bool
    layers: tuple[int, ...]


class Scaling(nn.Module):
    """Features of every layer made comparable, by the statistics of the training part.

    whiten: directions of little variance count as much as the widest ones. Trained features spread over few directions
    (the widest of 256 may hold half of the variance), on which a probe of some hundred updates would spend itself.
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
            # turned back (ZCA), so that layers of one residual stream can still be summed
            whitening_LDD = (vectors_LDD * values_LD[:, None].rsqrt()) @ vectors_LDD.transpose(1, 2)
            self.register_buffer("scale", whitening_LDD.float())
        self.scale: Tensor

    @torch.no_grad()
    def forward(self, x_NLD: Tensor) -> Tensor:
        """float16 again, as features are kept."""
        centred = (part.float() - self.mean_LD for part in torch.split(x_NLD, 8192))
        if not self.whiten:
            return torch.cat([(part * self.scale).half() for part in centred])
        return torch.cat([torch.einsum("nld,lde->nle", part, self.scale).half() for part in centred])


class Linears(nn.Module):
    """V linear probes fitted at once, each with its own selection of layers: (N, L, D) to (V, N, classes)."""

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
        """Classes, (V, N)."""
        classes_VN: np.ndarray = torch.cat([self(part).argmax(2) for part in torch.split(x_NLD, 8192)], dim=1).numpy()
        return classes_VN


@dataclass(frozen=True)
class Probe:
    """A fitted probe of some layers."""

    layers: tuple[int, ...]
    scaling: Scaling
    linear: Linears

    def predict(self, x_NLD: Tensor) -> np.ndarray:
        """Classes of features as an encoder gives them, (N,)."""
        guesses_N: np.ndarray = self.linear.predict(self.scaling(x_NLD[:, list(self.layers)]))[0]
        return guesses_N


def choose_view(train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int) -> View:
    """The view that is best on `valid`, fitted to every third vector; for encoders and baselines alike."""
    some = Labelled(train.x_NLD[::3], train.y_N[::3], train.speaker_N[::3], train.speakers)
    everything = tuple(range(train.x_NLD.shape[1]))
    selections = [everything, *((layer,) for layer in everything)] if len(everything) > 1 else [everything]
    # a covariance wants several vectors a dimension
    scalings = (False, True) if len(some.y_N) >= 4 * train.x_NLD.shape[2] else (False,)
    scores = np.stack([_fit(whiten, selections, some, valid, classes, config, seed)[2] for whiten in scalings])
    best = int(scores.argmax())
    return View(scalings[best // len(selections)], selections[best % len(selections)])


def fit_probe(
    train: Labelled, valid: Labelled, classes: int, config: ProbeConfig, seed: int, view: View | None = None
) -> Probe:
    """The epoch that is best on `valid`, with the view that is; the test speakers take no part."""
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
    """Probes as of the epoch that is best for their mean, and the best accuracy of each on `valid`."""
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
            # a sum of means: no probe feels the others
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
    device: str = "cpu",
) -> Callable[[Sequence[Example]], list[np.ndarray]]:
    """Trains from scratch on the labels; returns what names the classes of further examples."""
    torch.manual_seed(keyed_seed(seed, "supervised"))
    net = Supervised(model, classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr)
    rng = np.random.default_rng(seed)
    batches = _batches(train, config.batch_seconds)
    warmup = max(1, min(100, len(batches)))
    updates = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, max(0.02, 1 - done / max(1, updates)))
    )

    def logits(examples: Sequence[Example]) -> list[Tensor]:
        lengths_B = torch.tensor([len(wave) for wave, _, _ in examples], device=device)
        wave_BT = nn.utils.rnn.pad_sequence([wave for wave, _, _ in examples], batch_first=True).to(device)
        final = net.model(wave_BT, lengths_B).final
        rows = []
        for row, (_, frames, _) in enumerate(examples):
            x_FD = final.x_BFD[row, : max(1, int(final.lengths_B[row]))]
            picked = x_FD[frames.to(device).clamp(max=len(x_FD) - 1)] if per_frame else x_FD.mean(0, keepdim=True)
            rows.append(net.linear(picked))
        return rows

    @torch.inference_mode()
    def predict(examples: Sequence[Example]) -> list[np.ndarray]:
        net.eval()
        return [row.argmax(1).cpu().numpy() for example in examples for row in logits([example])]

    best, best_state = -1.0, net.state_dict()
    for _ in range(config.epochs):
        net.train()
        for number in rng.permutation(len(batches)):
            chosen = [train[i] for i in batches[number]]
            loss = F.cross_entropy(torch.cat(logits(chosen)), torch.cat([labels for _, _, labels in chosen]).to(device))
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
