"""What one optimizer step is, whatever runs it: prepare, one global count, forward and backward, apply."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.types import Batch
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.loss_scaler import LossScale
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule

NumpySum = tuple[np.ndarray, float]


SAMPLES = "data/micro_batch_samples"
"""The metric that sums the unpadded samples of what was really trained on; its count: micro-batches."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One global step, summed over micro-batches and ranks; the same on every rank."""

    loss: float
    metrics: Mapping[str, NumpySum]
    """name -> (sum, count)."""
    extras: Mapping[str, float]
    """The caller's own numbers, summed over ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: bool = False
    """The update was an outlier, and weights and moments were left as they were."""

    @property
    def samples(self) -> int:
        """Unpadded audio samples that were computed on, over all ranks."""
        return round(float(self.metrics[SAMPLES][0][0]))


class Engine(abc.ABC):
    """Runs optimizer steps on a TrainModule.

    The loss is Σ sums / Σ counts over the whole global step, so it does not depend on how the step's micro-batches
    are spread over ranks and accumulation slots.
    """

    module: TrainModule

    def __init__(
        self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, world: DistributedContext
    ) -> None:
        self.module, self.config, self.optimizer_config, self.world = module, config, optimizer, world
        self.scale = LossScale(config.precision)
        self.tell: Callable[[str], None] = lambda part: None
        """Called at the begin of each part of a step, so that a rank that hangs can be told from those that wait."""
        if config.compile:
            module.model.encoder.compile(dynamic=True)
        if world.device.startswith("cuda"):
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = config.tf32

    def step(
        self,
        batches: Sequence[Batch],
        ctx: StepContext,
        lr: float,
        extras: Mapping[str, float] | None = None,
        skip_above: float = math.inf,
        check: Callable[[Mapping[str, NumpySum]], None] | None = None,
    ) -> StepResult:
        """One optimizer update over this rank's micro-batches of a global step.

        extras: numbers of the caller's that ride along with the metrics' all-reduce. skip_above: leave weights and
        moments alone where the gradient norm is larger, the same number on all ranks. check: gets the summed metrics
        before anything is updated; what it raises, it must raise on all ranks. Raises FloatingPointError when
        the loss or the gradient norm is not finite; go back to a checkpoint then, the weights may be spoilt.
        """
        self.module.train()
        batches = [batch.to(self.world.device) for batch in batches]
        self.tell("targets")
        plans = [self.module.prepare(batch, ctx) for batch in batches]
        self.tell("sum of counts")
        counts_K = torch.stack([plan.counts_K for plan in plans]).sum(0)
        counts_K = self.world.sum(counts_K.to(self.world.device)).cpu()
        while True:
            loss, totals = self._accumulate(batches, plans, counts_K, ctx)
            self.tell("sum of losses")
            result_loss, reduced, summed_extras = self._reduce(loss, totals, dict(extras or {}))
            if not np.isfinite(result_loss):
                self._apply(lr, -math.inf)  # throws the gradients away
                raise FloatingPointError(f"the loss of step {ctx.step} is {result_loss}")
            if check is not None:
                check(reduced)
            self.tell("update")
            grad_norm = self._apply(lr, skip_above)
            if np.isfinite(grad_norm):
                break
            if not self.scale.lower():
                raise FloatingPointError(f"the gradient norm of step {ctx.step} is {grad_norm}")
        self.scale.fitted()
        skipped = grad_norm > skip_above
        if not skipped:
            self.module.after_step(ctx)
        return StepResult(result_loss, reduced, summed_extras, grad_norm, skipped)

    def _accumulate(
        self, batches: Sequence[Batch], plans: Sequence[object], counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Gradients of this rank's micro-batches; their share of the loss, and the sums of their metrics."""
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        totals: dict[str, list[Tensor]] = {}
        self.module.forget()
        for batch, plan in zip(batches, plans, strict=True):
            torch.manual_seed(keyed_seed(ctx.seed, ctx.step, batch.micro_batch, "dropout"))
            self.tell("forward pass")
            micro_loss, metrics = self._forward_backward(batch, plan, counts_K, ctx)
            loss += micro_loss.detach().double()
            _add(totals, metrics)
            _add(totals, {SAMPLES: (batch.lengths_B.sum(), torch.ones((), device=batch.lengths_B.device))})
        return loss, totals

    def _reduce(
        self, loss: Tensor, totals: Mapping[str, list[Tensor]], extras: Mapping[str, float]
    ) -> tuple[float, dict[str, NumpySum], dict[str, float]]:
        """One all-reduce for everything that is logged."""
        names = sorted(totals)
        parts = [loss.reshape(1), torch.tensor(list(extras.values()), dtype=torch.float64, device=loss.device)]
        parts += [part.double().reshape(-1).to(loss.device) for name in names for part in totals[name]]
        flat = self.world.sum(torch.cat(parts)).cpu().numpy()
        summed_extras = {name: float(value) for name, value in zip(extras, flat[1:], strict=False)}
        start, metrics = 1 + len(extras), {}
        for name in names:
            size = totals[name][0].numel()
            metrics[name] = (flat[start : start + size], float(flat[start + size]))
            start += size + 1
        return float(flat[0]), metrics, summed_extras

    @abc.abstractmethod
    def _forward_backward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        """Adds this micro-batch's gradient, times `scale`; returns its share of the global loss, and its metrics.

        Calls `tell` before the backward pass.
        """

    @abc.abstractmethod
    def _apply(self, lr: float, skip_above: float) -> float:
        """Sums gradients over ranks, divides by `scale`, clips, updates unless the norm is above `skip_above`.

        Returns the gradient norm before clipping. Where that is not finite, the gradients are thrown away.
        """

    @abc.abstractmethod
    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Copies of every weight, buffer (`model/NAME`) and moment (`MOMENT/NAME`), whole, in fp32, on the CPU.

        A collective: all ranks iterate, in step. With `load_tensors` it makes one checkpoint format for every engine,
        ZeRO stage and number of ranks.
        """

    @abc.abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Takes over what `tensors` gave after `step` updates, bit for bit."""


def _add(totals: dict[str, list[Tensor]], metrics: Mapping[str, Sum]) -> None:
    for name, parts in metrics.items():
        if name in totals:
            totals[name] = [old + new.double() for old, new in zip(totals[name], parts, strict=True)]
        else:
            totals[name] = [part.double() for part in parts]


def copy_buffers(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads the persistent buffers and untrained parameters of `module`, which no engine partitions."""
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            buffer.data.copy_(tensors[f"model/{name}"])


def buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The persistent buffers of `module` as `model/NAME`."""
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield f"model/{name}", copied(buffer)


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU that shares nothing with `value`."""
    return value.detach().to("cpu", copy=True).contiguous()
