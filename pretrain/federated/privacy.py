"""Differential privacy of a federated run: clipping, noise, and the ledger of what was spent.

DP-FedAvg and DP-FedSGD with a Poisson sample of the devices (arXiv 1710.06963, algorithm 1): a device's whole
contribution to a round is protected, not a single utterance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.engine_configs import FederatedConfig

Spent = tuple[tuple[float, float, int], ...]
"""Noise multiplier, sampling rate and number of rounds, for each stretch of rounds with the same values."""


@dataclass(frozen=True)
class Privacy:
    """Clips, adds noise and counts what a run spends.

    settings: clip norm, noise and budget.
    secret: keys noise and samples; devices must not know it, since they see the weights.
    """

    settings: FederatedConfig
    secret: str

    @property
    def rate(self) -> float:
        """Probability that a device takes part in a round."""
        return min(1.0, self.settings.per_round / self.settings.devices)

    def sample(self, present: Sequence[str], step: int, attempt: int) -> list[str]:
        """Returns a Poisson sample of the devices, sorted: each takes part with the same probability."""
        drawn = (keyed_rng(self.secret, step, attempt, name, "sample").random() < self.rate for name in present)
        return sorted(name for name, taken in zip(present, drawn, strict=True) if taken)

    def clipped(self, update: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Returns an update times `scale`, then scaled down to a norm of at most `clip`."""
        norm = scale * math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
        factor = scale * min(1.0, self.settings.clip / max(norm, 1e-12))
        return {name: tensor * factor for name, tensor in update.items()}

    def noise(self, name: str, shape: torch.Size, step: int) -> Tensor:
        """Returns Gaussian noise of deviation σ · clip for the sum of the clipped updates of a parameter, fp32."""
        generator = torch.Generator().manual_seed(keyed_seed(self.secret, step, name, "noise"))
        return torch.randn(shape, generator=generator) * (self.settings.noise * self.settings.clip)

    def epsilon(self, spent: Spent) -> float:
        """Returns ε at `delta` of the rounds in a ledger, by the accountant of opacus that the settings name.

        `rdp` is Mironov's Rényi accountant (arXiv 1908.10530), `prv` the upper bound of Gopi et al. (arXiv 2106.02848).

        Raises:
            ConfigError: opacus is not installed.
        """
        if not spent:
            return 0.0
        try:
            from opacus.accountants import PRVAccountant, RDPAccountant
        except ImportError as error:
            raise ConfigError(
                f"engine.federated.noise={self.settings.noise:g}: needs opacus: pip install opacus"
            ) from error
        accountant = PRVAccountant() if self.settings.accountant == "prv" else RDPAccountant()
        accountant.history = list(spent)
        return float(accountant.get_epsilon(self.settings.delta))

    def with_rounds(self, spent: Spent, rounds: int) -> Spent:
        """Returns the ledger after further rounds."""
        *earlier, last = spent or ((self.settings.noise, self.rate, 0),)
        if last[:2] == (self.settings.noise, self.rate):
            return (*earlier, (*last[:2], last[2] + rounds))
        return (*earlier, last, (self.settings.noise, self.rate, rounds))

    def affordable(self, spent: Spent, rounds: int) -> int:
        """Returns how many of `rounds` further rounds the budget allows."""
        if rounds and self.epsilon(self.with_rounds(spent, rounds)) <= self.settings.epsilon:
            return rounds  # one call of the accountant in each round, not one for each power of two
        low, high = 0, max(0, rounds - 1)
        while low < high:
            middle = (low + high + 1) // 2
            within = self.epsilon(self.with_rounds(spent, middle)) <= self.settings.epsilon
            low, high = (middle, high) if within else (low, middle - 1)
        return low


def ledger(values: Any) -> Spent:
    """Returns a ledger from plain JSON.

    Raises:
        ValueError: it has another form.
    """
    found: list[tuple[float, float, int]] = []
    for row in values if isinstance(values, list) else [values]:
        numbers: list[Any] = row if isinstance(row, list) and len(row) == 3 else [None]
        if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError(f"the ledger of privacy must be a list of [noise, rate, rounds], and has {row!r}")
        noise, rate, rounds = numbers
        found.append((float(noise), float(rate), int(rounds)))
    return tuple(found)
