"""Supervised baseline: the same encoder trained from scratch on the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from pretrain.evaluate.config import SupervisedConfig
from pretrain.evaluate.early_stopping import EarlyStopping
from pretrain.evaluate.frozen_encoders import Model


class Supervised(nn.Module):
    """The encoder and a linear layer on its last layer, trained together."""

    def __init__(self, model: Model, classes: int) -> None:
        super().__init__()
        self.model = model
        self.linear = nn.Linear(model.shape.dim, classes)


Example = tuple[Tensor, Tensor, Tensor]
"""A waveform (T,), the encoder frame of each label (C,), and the labels (C,); a single label is for the mean frame."""


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
    """Trains a model from scratch on labels until the accuracy on the validation speakers no longer rises.

    Args:
        model: an encoder with random weights, modified in place.
        train: examples to fit.
        valid: examples by which the best epoch is chosen.
        classes: number of classes.
        config: settings of the training.
        seed: seed of the linear layer and of the order of batches.
        per_frame: whether labels belong to frames rather than to whole utterances.
        device: torch device.

    Returns:
        A function that predicts the classes of further examples, (C,) each.
    """
    torch.manual_seed(keyed_seed(seed, "supervised"))
    net = Supervised(model, classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr)
    rng = np.random.default_rng(seed)
    batches = _batches(train, config.batch_seconds)
    warmup = max(1, min(100, len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / warmup, 1.0))
    share = max(1, config.patience // 3)

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

    stopping = EarlyStopping(net, config.patience)
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
        if stopping.ends_after(float((guesses == torch.cat([labels for _, _, labels in valid]).numpy()).mean())):
            break
        if stopping.passes_without_gain and stopping.passes_without_gain % share == 0:
            schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
    stopping.restore_best()
    return predict


def _batches(examples: Sequence[Example], seconds: float) -> list[list[int]]:
    """Groups examples of similar length, up to `seconds` of padded audio."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i][0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(examples[i][0]) > seconds * 16_000:
            batches.append([])
        batches[-1].append(i)
    return batches
