"""Early stopping: the weights of the best pass over the training data."""

from __future__ import annotations

import math

from torch import nn


class EarlyStopping:
    """Keeps the weights with the best score on validation data.

    Args:
        net: the module in training.
        patience: passes without a better score after which training ends.
    """

    def __init__(self, net: nn.Module, patience: int) -> None:
        self._net, self._patience = net, patience
        self._best, self._state = -math.inf, net.state_dict()
        self.passes_without_gain = 0

    def ends_after(self, score: float) -> bool:
        """Compares the score of one more pass, higher is better, and returns whether training ends here."""
        if score > self._best:
            self._best, self.passes_without_gain = score, 0
            self._state = {name: value.clone() for name, value in self._net.state_dict().items()}
        else:
            self.passes_without_gain += 1
        return self.passes_without_gain >= self._patience

    def restore_best(self) -> None:
        """Loads the weights of the best pass into the module."""
        self._net.load_state_dict(self._state)
