"""Balance of a multitask loss: a factor per task, from the losses and gradients of earlier updates.

fixed: all are 1, a strong baseline.  uncertainty: homoscedastic uncertainty (Kendall et al., arXiv 1705.07115) in
closed form: argmin over s of exp(−s)·L + s gives the factor 1 / L.  dwa: dynamic weight average (Liu et al., arXiv
1803.10704).  gradnorm: equal relative training rates (Chen et al., arXiv 1711.02257), with a multiplicative step
instead of Adam's.

Factors are functions of sums over all ranks and of buffers, which are part of the checkpoint: a resumed run and one on
another number of ranks continue with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.interfaces.configs import BalanceConfig

TASK_GRADIENTS = "balance/task_gradients"
"""Metric: sum over frames of the squared gradient of each task's loss, (K,), in an arbitrary unit common to all."""
FACTOR = "balance/factor/"


class Balance(nn.Module):
    """Keeps the factors of K tasks. Without tasks to balance, or with fixed factors, it has no state.

    Args:
        config: the method and its settings.
        signed: for each task whether its loss may be negative; gradnorm then takes its training rate as the mean one.
    """

    LEAST_LOSS = 1e-3

    def __init__(self, config: BalanceConfig, signed: Sequence[bool]) -> None:
        super().__init__()
        self.config, self.signed = config, list(signed)
        self.adaptive = config.name != "fixed" and len(signed) > 1
        if self.adaptive:
            K, dtype = len(signed), torch.float64
            self.register_buffer("factors_K", torch.ones(K, dtype=dtype))
            self.register_buffer("means_K", torch.zeros(K, dtype=dtype))
            self.register_buffer("first_K", torch.zeros(K, dtype=dtype))
            self.register_buffer("seen_K", torch.zeros(K, dtype=torch.bool))
            if config.name == "dwa":
                self.register_buffer("past_NK", torch.zeros(config.window, K, dtype=dtype))
                self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.factors_K: Tensor
        self.means_K: Tensor
        self.first_K: Tensor
        self.seen_K: Tensor
        self.past_NK: Tensor
        self.updates: Tensor

    def update(self, losses_K: Tensor, counts_K: Tensor, gradients_K: Tensor) -> None:
        """Updates the factors after one update; all arguments are sums over micro-batches and ranks, float64, (K,).

        Args:
            losses_K: losses of the tasks, without weights and factors.
            counts_K: their targets; a task without one keeps its state.
            gradients_K: squared norms of the weighted losses' gradients at the encoder's output; 0 where unknown.
        """
        if not self.adaptive:
            return
        losses_K, counts_K, gradients_K = (
            part.to(self.means_K) for part in (losses_K, counts_K, gradients_K)
        )  # float64, on the device of the state
        counted_K = counts_K > 0
        new_K = torch.where(counted_K, losses_K / counts_K.clamp(min=1), self.means_K)
        first_K = counted_K & ~self.seen_K
        decay = self.config.smoothing
        means_K = torch.where(self.seen_K, decay * self.means_K + (1 - decay) * new_K, new_K)
        self.means_K.copy_(torch.where(counted_K, means_K, self.means_K))
        self.first_K.copy_(torch.where(first_K, new_K, self.first_K))
        self.seen_K |= counted_K
        if self.config.name == "uncertainty":
            self.factors_K.copy_(self._uncertainty())
        else:
            self.factors_K.copy_(self._dwa() if self.config.name == "dwa" else self._gradnorm(gradients_K))

    def _uncertainty(self) -> Tensor:
        return torch.where(self.seen_K, 1 / self.means_K.clamp(min=self.LEAST_LOSS), self.factors_K)

    def _dwa(self) -> Tensor:
        place = int(self.updates) % len(self.past_NK)
        past_K = self.past_NK[place].clone()
        self.past_NK[place] = self.means_K
        self.updates += 1
        compared_K = self.seen_K & (past_K > 0)
        rates_K = torch.where(compared_K, self.means_K / past_K.clamp(min=self.LEAST_LOSS), torch.ones_like(past_K))
        shares_K = (rates_K / self.config.temperature).masked_fill(~self.seen_K, -torch.inf).softmax(0)
        return torch.where(self.seen_K, shares_K * self.seen_K.sum(), self.factors_K)

    def _gradnorm(self, gradients_K: Tensor) -> Tensor:
        norms_K = gradients_K.sqrt()
        active_K = self.seen_K & (norms_K > 0)
        if int(active_K.sum()) < 2:
            return self.factors_K
        signed_K = torch.tensor(self.signed, device=norms_K.device)
        rates_K = self.means_K.clamp(min=self.LEAST_LOSS) / self.first_K.clamp(min=self.LEAST_LOSS)
        usual_K = active_K & ~signed_K
        mean = rates_K[usual_K].mean() if bool(usual_K.any()) else rates_K.new_ones(())
        relative_K = torch.where(signed_K, torch.ones_like(rates_K), rates_K / mean)
        target_K = norms_K[active_K].mean() * relative_K**self.config.asymmetry
        moved_K = self.factors_K * (target_K / norms_K.clamp(min=1e-300)) ** self.config.rate
        moved_K = moved_K.clamp(1 / self.config.largest, self.config.largest)
        return torch.where(active_K, moved_K / moved_K[active_K].mean(), self.factors_K)

    def of(self, number: int) -> Tensor | float:
        """Returns the factor of task `number`."""
        return self.factors_K[number].float() if self.adaptive else 1.0


def gradient_shares(squares_K: np.ndarray) -> np.ndarray:
    """Returns each task's share of the sum of gradient norms, (K,); zeros where all are 0.

    Args:
        squares_K: metric `TASK_GRADIENTS`, summed over micro-batches and ranks.
    """
    norms_K = np.sqrt(squares_K.clip(min=0.0))
    shares_K: np.ndarray = norms_K / max(float(norms_K.sum()), 1e-300)
    return shares_K
