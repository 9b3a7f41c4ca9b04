"""Early stopping: which pass ends training, and whose weights remain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.evaluate.early_stopping import EarlyStopping


def passes(scores: list[float], patience: int) -> tuple[int, float]:
    """Returns the number of passes done and the weight that remains; pass n sets the weight to n."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    stopping, done = EarlyStopping(net, patience), 0
    for score in scores:
        done += 1
        with torch.no_grad():
            net.weight.fill_(done)
        if stopping.ends_after(score):
            break
    stopping.restore_best()
    return done, net.weight.item()


@pytest.mark.parametrize(
    ("scores", "patience", "done", "kept"),
    [
        ([0.1, 0.5, 0.4, 0.4, 0.9], 2, 4, 2.0),
        ([0.1, 0.5, 0.4, 0.6, 0.6], 2, 5, 4.0),
        ([0.3, 0.3, 0.3], 1, 2, 1.0),
        ([-3.0, -2.0, -1.0], 1, 3, 3.0),
        ([math.nan, 0.2, math.nan], 3, 3, 2.0),
    ],
)
def test_training_ends_after_the_patience_and_keeps_the_first_best_pass(
    scores: list[float], patience: int, done: int, kept: float
) -> None:
    assert passes(scores, patience) == (done, kept)
