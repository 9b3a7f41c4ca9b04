"""Hard-concrete gates on heads and channels, for structured pruning (Louizos et al., arXiv 1712.01312).

The expected share of removed weights is held at a target by two multipliers (augmented Lagrangian; Wang et al., arXiv
1910.04732, §3.3; DPHuBERT, arXiv 2305.17651, eq. 5). Gates and the quadratic multiplier learn about 100 times faster
than weights: they are stored divided by 100, so that the one Adam of the model moves them fast enough; the gradient of
multipliers is reversed, so that they climb. The papers begin with multipliers of 0. Both then grow while the gates are
still open, and the share overshoots its target until they have shrunk again, which a short run or a falling learning
rate does not allow. So the quadratic one begins large and holds the share, and the linear one follows ten times slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import BlockGates, ModelGates
from pretrain.interfaces.models import ChannelGroup, Frontend
from pretrain.nn.block_stack import BlockStack

FASTER = 100.0
"""Ratio of the learning rate of gates and multipliers to that of weights."""
LINEAR_FASTER, QUADRATIC = 10.0, 50.0
"""The same ratio of the linear multiplier, and the quadratic one at first."""
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""β, γ and ζ of the paper: temperature, and the interval that is clipped to [0, 1]."""
_MARGIN = 1e-6
"""Least distance of uniform draws from 0 and 1."""


class Gated(NamedTuple):
    """Gates of one pass.  sparsity: expected share of the prunable weights that is removed.  penalty: scalar."""

    gates: ModelGates
    sparsity: Tensor
    penalty: Tensor


class _Weights(NamedTuple):
    """Weights that are all kept while the gates of these parts are open.  number: of weights.  parts: indices."""

    number: int
    parts: tuple[int, ...]


class HardConcreteGates(nn.Module):
    """One gate per head, per inner channel of a block, and per channel between a front end's layers.

    The feed-forward parts of a block share gates, since `encoder.widths` gives them the same number of channels. All
    gates are one parameter, used in `forward` only (ZeRO-3). Its parts: each of the front end's channel groups, then,
    block by block, the heads and the channels.

    Args:
        frontend: the front end whose channels are pruned; None: it has no gates. Not kept.
        encoder: the stack whose heads and channels are pruned; not kept.
        drop_rate: probability that a gate is closed at first.
    """

    def __init__(self, frontend: Frontend | None, encoder: BlockStack, drop_rate: float = 0.01) -> None:
        super().__init__()
        groups = () if frontend is None else frontend.channel_groups()
        self.sizes = [group.size for group in groups]
        self.n_groups, self.n_feed_forwards = len(groups), len(encoder.feed_forwards)
        self.weights = [] if frontend is None else _weights_of(frontend, groups)
        for width in encoder.stack_config.block_widths:
            per_head, per_channel = width.head_dim * (4 * encoder.dim + 3), 2 * encoder.dim + 1
            for size, per_gate in ((width.heads, per_head), (width.ffn_dim, per_channel * self.n_feed_forwards)):
                self.weights.append(_Weights(size * per_gate, (len(self.sizes),)))
                self.sizes.append(size)
        start = math.log(1 - drop_rate) - math.log(drop_rate)
        self.theta_N = nn.Parameter(torch.full((sum(self.sizes),), start / FASTER))
        self.multipliers_2 = nn.Parameter(torch.tensor([0.0, QUADRATIC / FASTER]))

    def forward(self, target: float) -> Gated:
        """Draws the gates in training mode; returns the closed and soft ones of `closed` otherwise.

        Args:
            target: expected share of the weights to remove at this update.
        """
        log_alpha_N, multipliers_2 = FASTER * self.theta_N, _reversed(self.multipliers_2)
        first, second = LINEAR_FASTER * multipliers_2[0], FASTER * multipliers_2[1]
        sparsity = self.share_removed(open_probability(log_alpha_N))
        off = sparsity - target
        if self.training:
            u_N = torch.rand(len(log_alpha_N), device=log_alpha_N.device).clamp(_MARGIN, 1 - _MARGIN)
            gates_N = stretched(((u_N.log() - (1 - u_N).log() + log_alpha_N) / TEMPERATURE).sigmoid())
        else:
            gates_N = self.closed(log_alpha_N)
        return Gated(self.by_part(gates_N), sparsity, first * off + second * off.square())

    @torch.no_grad()
    def closed(self, log_alpha_N: Tensor) -> Tensor:
        """Returns the gates after training, (N,): of each part, as many are 0 as are expected to be closed, not all.

        Those with the smallest probability of being open are closed (as in CoFi, arXiv 2204.00408); others stay soft.
        """
        soft_N, closed_N = stretched(log_alpha_N.sigmoid()), (1 - open_probability(log_alpha_N))
        found = []
        for part_K, closed_K in zip(*(torch.split(x_N, self.sizes) for x_N in (soft_N, closed_N)), strict=True):
            n_closed = min(round(float(closed_K.sum())), len(closed_K) - 1)
            lowest = closed_K.argsort(descending=True, stable=True)[:n_closed]
            found.append(part_K.index_fill(0, lowest, 0.0))
        return torch.cat(found)

    def share_removed(self, open_N: Tensor) -> Tensor:
        """Returns the expected share of the prunable weights that is removed, a scalar.

        Args:
            open_N: probability that each gate is open, or 0 and 1. Weights between two layers with gates are kept
                where both are open, independently (DPHuBERT, §3.2). One head or channel of each part always counts.
        """
        means = [part_K.mean().clamp(min=1 / len(part_K)) for part_K in torch.split(open_N, self.sizes)]
        kept = [
            weights.number * torch.stack([means[part] for part in weights.parts]).prod() for weights in self.weights
        ]
        return 1 - torch.stack(kept).sum() / sum(weights.number for weights in self.weights)

    def by_part(self, gates_N: Tensor) -> ModelGates:
        """Splits the gates into those of the front end and of each block."""
        parts = torch.split(gates_N, self.sizes)
        pairs = zip(parts[self.n_groups :: 2], parts[self.n_groups + 1 :: 2], strict=True)
        blocks = tuple(BlockGates(heads_H, (channels_C,) * self.n_feed_forwards) for heads_H, channels_C in pairs)
        return ModelGates(tuple(parts[: self.n_groups]), blocks)


def _weights_of(frontend: Frontend, groups: Sequence[ChannelGroup]) -> list[_Weights]:
    """Returns the weights of a front end that belong to its groups of channels."""
    touched: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        for name in (*group.rows, *group.columns):
            touched.setdefault(name, []).append(number)
    return [_Weights(frontend.get_parameter(name).numel(), tuple(parts)) for name, parts in touched.items()]


def open_probability(log_alpha_N: Tensor) -> Tensor:
    """Returns the probability that a gate is not 0 (arXiv 1712.01312, eq. 12)."""
    return (log_alpha_N - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def stretched(s_N: Tensor) -> Tensor:
    """Returns s stretched to (γ, ζ) and clipped to [0, 1] (eq. 10 and 11)."""
    return (s_N * (HIGH - LOW) + LOW).clamp(0, 1)


def _reversed(x: Tensor) -> Tensor:
    """Returns x with the opposite gradient."""
    return 2 * x.detach() - x
