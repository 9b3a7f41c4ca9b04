"""AdamW, its parameter groups, and the initial state of its moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter, apart from the update count."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Returns AdamW's groups: matrices and kernels decay, parameters of one dimension (biases, norms) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    plain = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class GatedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) that skips updates with a gradient norm above `limit`.

    ZeRO calls `step` once per parameter group.
    """

    norm: Callable[[], float] = staticmethod(lambda: 0.0)
    limit = math.inf

    def step(self, closure: Any = None) -> Any:
        """Updates the weights; above the limit only counts the update; does nothing if the norm is not finite."""
        norm = self.norm()
        if not math.isfinite(norm):
            return None
        if norm <= self.limit:
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] += 1  # a resume sets it to the run's step
        return None


def make_optimizer(module: nn.Module, config: OptimizerConfig, fused: bool = False) -> GatedAdamW:
    """Returns the optimizer that all engines use; `fused` selects torch's single kernel for all parameters."""
    groups = parameter_groups(module, config.weight_decay)
    return GatedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def first_state(owner: Tensor, step: int, fused: bool) -> dict[str, Tensor]:
    """Returns Adam's state of a parameter (or of ZeRO's flat partition) after `step` updates, with zero moments."""
    device = owner.device if fused else torch.device("cpu")
    moments = {moment: torch.zeros_like(owner, requires_grad=False) for moment in MOMENTS}
    return {"step": torch.tensor(float(step), device=device), **moments}
