"""A baseline without pretraining: log-mel with context into a network with as many weights as the encoder."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng, keyed_seed
from pretrain.evaluate.config import NeuralConfig
from pretrain.evaluate.early_stopping import EarlyStopping
from pretrain.evaluate.features import Labelled


def width_for(weights: int, dim: int, classes: int) -> int:
    """Returns the width H of two hidden layers from their number of weights: H² + H (dim + classes) = weights."""
    half = (dim + classes) / 2
    return max(8, round(math.sqrt(half * half + weights) - half))


class NeuralProbe(nn.Module):
    """Standardised features, two hidden layers, classes.

    Args:
        x_ND: features by which inputs are standardised.
        width: units of each hidden layer.
        classes: number of classes.
        dropout: after each hidden layer.
    """

    def __init__(self, x_ND: Tensor, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean_D", x_ND.mean(0))
        self.register_buffer("scale_D", 1 / (x_ND.std(0) + 1e-4))
        self.mean_D: Tensor
        self.scale_D: Tensor
        hidden = [nn.Linear(x_ND.shape[1], width), nn.Linear(width, width)]
        blocks = [nn.Sequential(layer, nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)) for layer in hidden]
        self.net = nn.Sequential(*blocks, nn.Linear(width, classes))

    def forward(self, x_ND: Tensor) -> Tensor:
        logits_NC: Tensor = self.net((x_ND.float() - self.mean_D) * self.scale_D)
        return logits_NC

    @torch.inference_mode()
    def predict(self, x_ND: Tensor) -> np.ndarray:
        """Returns the predicted classes, (N,)."""
        self.eval()
        classes_N: np.ndarray = torch.cat([self(part).argmax(1) for part in torch.split(x_ND, 8192)]).numpy()
        return classes_N


def fit_neural(
    train: Labelled, valid: Labelled, classes: int, weights: int, config: NeuralConfig, seed: int
) -> NeuralProbe:
    """Fits the network until the accuracy on the validation speakers no longer rises.

    Args:
        train: (N, 1, D) features and labels to fit.
        valid: those of the validation speakers.
        classes: number of classes.
        weights: number of weights of the encoder that it is compared with.
        config: learning rate, epochs and patience.
        seed: seed of the initial weights, of dropout and of the order of vectors.
    """
    torch.manual_seed(keyed_seed(seed, "neural probe"))
    x_ND, valid_ND = train.x_NLD[:, 0], valid.x_NLD[:, 0]
    net = NeuralProbe(x_ND[:40_000].float(), width_for(weights, x_ND.shape[1], classes), classes, config.dropout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr)
    stopping = EarlyStopping(net, config.patience)
    for epoch in range(config.epochs):
        net.train()
        order = torch.from_numpy(keyed_rng(seed, epoch, "neural probe").permutation(len(x_ND)))
        for pick in torch.split(order, config.batch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(x_ND[pick]), train.y_N[pick]))
            optimizer.step()
        if stopping.ends_after(float((net.predict(valid_ND) == valid.y_N.numpy()).mean())):
            break
    stopping.restore_best()
    return net
