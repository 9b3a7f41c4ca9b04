"""The plain torch engine: the reference that the DeepSpeed engine is tested against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engines.base import Engine, buffers, copy_buffers, fitting, host_copy
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.optimizer import MOMENTS, first_state, make_optimizer
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule, TrainPlan


class TorchEngine(Engine):
    """Runs the step in plain torch: every rank holds all weights and moments; one all-reduce sums the gradients.

    Args:
        module: model and objective.
        config: engine settings.
        optimizer: AdamW settings.
        world: this rank and the number of ranks.
    """

    def __init__(
        self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, world: DistributedContext
    ) -> None:
        super().__init__(module.to(world.device), config, optimizer, world)
        self.optimizer = make_optimizer(module, optimizer, config.fused)

    def _forward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        assert isinstance(plan, TrainPlan)
        loss, metrics = self.module(batch, plan, counts_K, ctx)
        return loss, metrics

    def _forward_backward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        loss, metrics = self._forward(batch, plan, counts_K, ctx)
        self.on_phase("backward pass")
        (loss * self.scale.value).backward()  # type: ignore[no-untyped-call]
        return loss, metrics

    def _apply(self, lr: float, skip_above: float) -> float:
        trained, norm, total_norm = self._summed()
        if math.isfinite(norm):
            if self.optimizer_config.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(trained, self.optimizer_config.clip_norm, total_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.norm, self.optimizer.limit = lambda: norm, skip_above
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _add_update(self, lr: float, skip_above: float) -> float:
        """Subtracts `lr` times the gradient from the weights, without moments and clipping; else as `_apply`."""
        trained, norm, _ = self._summed()
        if math.isfinite(norm) and norm <= skip_above:
            with torch.no_grad():
                for parameter in trained:
                    if parameter.grad is not None:
                        parameter.sub_(lr * parameter.grad)
        self.optimizer.zero_grad()
        return norm

    def _summed(self) -> tuple[list[nn.Parameter], float, Tensor]:
        """Sums gradients over ranks and divides them by `scale`; returns the trained weights and their global norm."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # layer drop: zeros, as with DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in trained if parameter.grad is not None]
        if self.world.size > 1:
            flat = self.world.sum(torch.cat([grad.reshape(-1) for grad in grads]))
            for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))
        if self.scale.value != 1.0:
            torch._foreach_mul_(grads, 1.0 / self.scale.value)
        total_norm = torch.nn.utils.get_total_norm(grads)
        return trained, float(total_norm), total_norm

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield f"model/{name}", host_copy(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                state = self.optimizer.state.get(parameter, {})
                yield f"{moment}/{name}", host_copy(state.get(moment, torch.zeros_like(parameter)))
        yield from buffers(self.module)

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        copy_buffers(self.module, tensors)
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(fitting(tensors, f"model/{name}", parameter.shape))
            if parameter.requires_grad and step:
                state = first_state(parameter, step, self.config.fused)
                for moment in MOMENTS:
                    state[moment].copy_(fitting(tensors, f"{moment}/{name}", parameter.shape))
                self.optimizer.state[parameter] = state
