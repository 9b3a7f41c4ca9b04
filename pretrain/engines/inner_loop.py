"""The inner loop of meta-learning: gradient descent on the support of an episode, as a function of its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Path:
    """weights: at the start and after each step.  losses: of the support before each step."""

    weights: list[Weights]
    losses: list[Tensor]


def descend(
    start: Mapping[str, Tensor],
    loss: Callable[[Weights, int], Tensor],
    rate: Callable[[str, int], Tensor],
    steps: int,
    second_order: bool = False,
    differentiable: bool = True,
) -> Path:
    """Takes steps of gradient descent (MAML, arXiv 1703.03400, eq. 1).

    Later weights are functions of the start and of the rates. Without `second_order` their derivative by the start is
    that of a copy: gradients count as constants, as in first-order MAML (§5.2).

    Args:
        start: weights by name.
        loss: returns the loss of weights in a step, a scalar.
        rate: returns the learning rate of a weight in a step.
        steps: number of steps.
        second_order: whether gradients are functions of the start, too.
        differentiable: whether later weights are functions of the start at all; else memory does not grow with steps.
    """
    # views: a start may depend on another one, and gradients of a step are those by its own weights
    weights: Weights = {
        name: w.view_as(w) if differentiable and w.requires_grad else w.detach().requires_grad_()
        for name, w in start.items()
    }
    path = Path([weights], [])
    for step in range(steps):
        value = loss(weights, step)
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=second_order, allow_unused=True)
        weights = {
            name: w if grad is None else w - rate(name, step) * grad
            for (name, w), grad in zip(weights.items(), grads, strict=True)
        }
        if not differentiable:
            weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        path.losses.append(value.detach())
        path.weights.append(weights)
    return path


def step_shares(updates: int, done: int, steps: int) -> list[float]:
    """Returns the share of the queries' loss after each inner step (MAML++, arXiv 1810.09502, §4, multi-step loss).

    Args:
        updates: updates until the last step alone counts; 0: it does from the start.
        done: updates done.
        steps: inner steps.
    """
    others = max(0.0, 1.0 - done / updates) / steps if updates else 0.0
    return [others] * (steps - 1) + [1.0 - others * (steps - 1)]
