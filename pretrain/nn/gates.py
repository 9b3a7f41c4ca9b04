"""Hard-concrete gates on heads and inner channels, for structured pruning (Louizos et al., arXiv 1712.01312).

The expected share of removed weights is held at a target by two multipliers (augmented Lagrangian; Wang et al., arXiv
1910.04732, §3.3; DPHuBERT, arXiv 2305.17651, eq. 5). Gates and multipliers learn about 100 times faster than weights:
both are stored divided by 100, so that the one Adam of the model moves them fast enough, and the multipliers' gradient
is reversed, so that it climbs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import BlockGates
from pretrain.nn.block_stack import BlockStack

FASTER = 100.0
"""Ratio of the learning rate of gates and multipliers to that of weights."""
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""β, γ and ζ of the paper: temperature, and the interval that is clipped to [0, 1]."""
_MARGIN = 1e-6
"""Least distance of uniform draws from 0 and 1."""


class Gated(NamedTuple):
    """Gates of one pass.  sparsity: expected share of the prunable weights that is removed.  penalty: scalar."""

    gates: tuple[BlockGates, ...]
    sparsity: Tensor
    penalty: Tensor


class HardConcreteGates(nn.Module):
    """One gate per head and per inner channel of each feed-forward part.

    All gates are one parameter, used in `forward` only (ZeRO-3).

    Args:
        encoder: the stack whose heads and channels are pruned; not kept.
        drop_rate: probability that a gate is closed at first.
    """

    def __init__(self, encoder: BlockStack, drop_rate: float = 0.01) -> None:
        super().__init__()
        parts, weights = len(encoder.feed_forwards), []
        self.sizes: list[tuple[int, int]] = []
        for width in encoder.stack_config.block_widths:
            self.sizes.append((width.heads, width.ffn_dim))
            per_head = width.head_dim * (4 * encoder.dim + 3)
            weights += [per_head] * width.heads + [2 * encoder.dim + 1] * (width.ffn_dim * parts)
        self.parts = parts
        start = math.log(1 - drop_rate) - math.log(drop_rate)
        self.theta_N = nn.Parameter(torch.full((len(weights),), start / FASTER))
        self.multipliers_2 = nn.Parameter(torch.zeros(2))
        self.register_buffer("weights_N", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.weights_N: Tensor

    def forward(self, target: float) -> Gated:
        """Draws the gates in training mode; returns the closed and soft ones of `closed` otherwise.

        Args:
            target: expected share of the weights to remove at this update.
        """
        log_alpha_N, (first, second) = FASTER * self.theta_N, FASTER * _reversed(self.multipliers_2)
        sparsity = 1 - (open_probability(log_alpha_N) * self.weights_N).sum() / self.weights_N.sum()
        off = sparsity - target
        if self.training:
            u_N = torch.rand(len(log_alpha_N), device=log_alpha_N.device).clamp(_MARGIN, 1 - _MARGIN)
            gates_N = stretched(((u_N.log() - (1 - u_N).log() + log_alpha_N) / TEMPERATURE).sigmoid())
        else:
            gates_N = self.closed(log_alpha_N)
        return Gated(self.by_block(gates_N), sparsity, first * off + second * off.square())

    @torch.no_grad()
    def closed(self, log_alpha_N: Tensor) -> Tensor:
        """Returns the gates after training, (N,): of each kind and block, as many are 0 as are expected to be closed.

        Those with the smallest probability of being open are closed (as in CoFi, arXiv 2204.00408); others stay soft.
        """
        soft_N, closed_N = stretched(log_alpha_N.sigmoid()), (1 - open_probability(log_alpha_N))
        found = []
        for part_K, closed_K in zip(self._parts(soft_N), self._parts(closed_N), strict=True):
            n_closed = round(float(closed_K.sum()))
            lowest = closed_K.argsort(descending=True, stable=True)[:n_closed]
            found.append(part_K.index_fill(0, lowest, 0.0))
        return torch.cat(found)

    def removed(self, gates_N: Tensor) -> float:
        """Returns the share of the prunable weights whose gate is 0."""
        return float((self.weights_N * (gates_N == 0)).sum() / self.weights_N.sum())

    def by_block(self, gates_N: Tensor) -> tuple[BlockGates, ...]:
        """Splits the gates into those of each block."""
        parts = self._parts(gates_N)
        step = 1 + self.parts
        return tuple(BlockGates(parts[at], tuple(parts[at + 1 : at + step])) for at in range(0, len(parts), step))

    def _parts(self, x_N: Tensor) -> Sequence[Tensor]:
        lengths = [length for heads, ffn_dim in self.sizes for length in (heads, *[ffn_dim] * self.parts)]
        return torch.split(x_N, lengths)


def open_probability(log_alpha_N: Tensor) -> Tensor:
    """Returns the probability that a gate is not 0 (arXiv 1712.01312, eq. 12)."""
    return (log_alpha_N - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def stretched(s_N: Tensor) -> Tensor:
    """Returns s stretched to (γ, ζ) and clipped to [0, 1] (eq. 10 and 11)."""
    return (s_N * (HIGH - LOW) + LOW).clamp(0, 1)


def _reversed(x: Tensor) -> Tensor:
    """Returns x with the opposite gradient."""
    return 2 * x.detach() - x
