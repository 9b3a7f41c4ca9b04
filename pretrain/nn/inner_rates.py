"""Learning rates of the inner loop of meta-learning: one per adapted tensor and step (MAML++, arXiv 1810.09502, §4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class InnerRates(nn.Module):
    """Holds the logarithm of each rate, so that an update of any size leaves it above 0.

    Args:
        names: names of the adapted weights.
        steps: inner steps.
        rate: initial value of all rates.
        learned: whether the outer loop changes them.
    """

    def __init__(self, names: Iterable[str], steps: int, rate: float, learned: bool) -> None:
        super().__init__()
        self.names = tuple(names)
        start_S = torch.full((steps,), math.log(rate))
        self.logs = nn.ParameterDict({_key(name): nn.Parameter(start_S.clone(), learned) for name in self.names})

    def rate(self, name: str, step: int) -> Tensor:
        """Returns the rate of a weight in inner step `step`, a scalar."""
        log_S: Tensor = self.logs[_key(name)]
        return log_S[step].exp()

    def forward(self) -> dict[str, Tensor]:
        """Returns all rates, (steps,) by weight."""
        return {name: self.logs[_key(name)].exp() for name in self.names}


def _key(name: str) -> str:
    """Returns the name of a weight as one of a parameter, which has no dots."""
    return name.replace(".", "/")


def chosen_weights(names: Sequence[str], prefixes: Sequence[str], field: str) -> list[str]:
    """Returns the weights that `prefixes` name, in the order of `names`.

    Args:
        names: names of all weights.
        prefixes: names of weights, or of modules, which stand for all their weights.
        field: the field that has the prefixes, for the message.

    Raises:
        ValueError: a prefix names no weight.
    """
    for prefix in prefixes:
        if not any(_below(name, prefix) for name in names):
            tops = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"{field}={prefix}: names no weight that learns; there are: {', '.join(tops)} …")
    return [name for name in names if any(_below(name, prefix) for prefix in prefixes)]


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
