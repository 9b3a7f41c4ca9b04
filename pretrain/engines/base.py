"""One optimizer step, whatever engine runs it: prepare, count, forward and backward, reduce, update."""

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
from pretrain.engines.signals import RankSignals
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule

NumpySum = tuple[np.ndarray, float]


SAMPLES = "data/micro_batch_samples"
"""The metric that sums the unpadded samples of the micro-batches trained on; its count: micro-batches."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One global step, summed over micro-batches and ranks; the same on every rank."""

    loss: float
    metrics: Mapping[str, NumpySum]
    """name -> (sum, count)."""
    signals: RankSignals
    """What the ranks reported to each other, summed."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: bool = False
    """The update was an outlier, and weights and moments were left as they were."""

    @property
    def samples(self) -> int:
        """Unpadded audio samples of the update, over all ranks."""
        return round(float(self.metrics[SAMPLES][0][0]))


class Engine(abc.ABC):
    """Runs optimizer steps on a TrainModule.

    The loss is Σ sums / Σ counts over the whole global step, so it does not depend on how the step's micro-batches
    are distributed over ranks and accumulation slots.
    """

    module: TrainModule

    def __init__(
        self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, world: DistributedContext
    ) -> None:
        self.module, self.config, self.optimizer_config, self.world = module, config, optimizer, world
        self.scale = LossScale(config.precision)
        self.tell: Callable[[str], None] = lambda part: None
        """Called at the start of each part of a step, which distinguishes a rank that hangs from those that wait."""
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
        signals: RankSignals | None = None,
        skip_above: float = math.inf,
        check: Callable[[Mapping[str, NumpySum], RankSignals], None] | None = None,
    ) -> StepResult:
        """Makes one optimizer update.

        Args:
            batches: this rank's micro-batches of the global step.
            ctx: seed and step, which key all draws.
            lr: learning rate of this update.
            signals: this rank's report to the others; travels with the metrics.
            skip_above: weights and moments stay as they are where the gradient norm is larger; alike on all ranks.
            check: gets the summed metrics and signals before anything is updated; it must raise on all ranks or none.

        Returns:
            Loss, metrics and signals, summed over micro-batches and ranks.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite. Weights may be damaged: return to a
                checkpoint.
        """
        self.module.train()
        signals = signals or RankSignals(wait_seconds=(0.0,) * self.world.size)

        # prepare: masks and the number of targets of each micro-batch, without a forward pass
        batches = [batch.to(self.world.device) for batch in batches]
        self.tell("targets")
        plans = [self.module.prepare(batch, ctx) for batch in batches]

        # count: the loss of every micro-batch is divided by the targets of the whole global step
        self.tell("sum of counts")
        counts_K = torch.stack([plan.counts_K for plan in plans]).sum(0)
        counts_K = self.world.sum(counts_K.to(self.world.device)).cpu()

        while True:
            # forward and backward: gradients add up over this rank's micro-batches
            loss, totals = self._accumulate(batches, plans, counts_K, ctx)

            # reduce: loss, metrics and signals of all ranks in one tensor
            self.tell("sum of losses")
            total_loss, metrics, received = self._reduce(loss, totals, signals)
            if not np.isfinite(total_loss):
                self._apply(lr, -math.inf)  # discards the gradients
                raise FloatingPointError(f"the loss of step {ctx.step} is {total_loss}")
            if check is not None:
                check(metrics, received)

            # update: sum the gradients over ranks, clip, AdamW; after an fp16 overflow again at half the loss scale
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
        return StepResult(total_loss, metrics, received, grad_norm, skipped)

    def _accumulate(
        self, batches: Sequence[Batch], plans: Sequence[object], counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Computes the gradients of this rank's micro-batches; returns their share of the loss and metric sums."""
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
        self, loss: Tensor, totals: Mapping[str, list[Tensor]], signals: RankSignals
    ) -> tuple[float, dict[str, NumpySum], RankSignals]:
        """Sums loss, metrics and signals over ranks, in one all-reduce."""
        names, record = sorted(totals), signals.packed()
        parts = [loss.reshape(1), record.to(loss.device)]
        parts += [part.double().reshape(-1).to(loss.device) for name in names for part in totals[name]]
        flat = self.world.sum(torch.cat(parts)).cpu()
        received = RankSignals.unpacked(flat[1 : 1 + len(record)])
        sums, metrics = flat[1 + len(record) :].numpy(), {}
        for name in names:
            size = totals[name][0].numel()
            metrics[name] = (sums[:size], float(sums[size]))
            sums = sums[size + 1 :]
        return float(flat[0]), metrics, received

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

        Returns the gradient norm before clipping. Where that is not finite, the gradients are discarded.
        """

    @abc.abstractmethod
    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yields copies of every weight, buffer (`model/NAME`) and moment (`MOMENT/NAME`), whole, in fp32, on the CPU.

        A collective: all ranks iterate, in step. With `load_tensors` it makes one checkpoint format for every engine,
        ZeRO stage and number of ranks.
        """

    @abc.abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Loads what `tensors` yielded after `step` updates, bit for bit."""


def _add(totals: dict[str, list[Tensor]], metrics: Mapping[str, Sum]) -> None:
    for name, parts in metrics.items():
        if name in totals:
            totals[name] = [old + new.double() for old, new in zip(totals[name], parts, strict=True)]
        else:
            totals[name] = [part.double() for part in parts]


def fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Returns a tensor of a checkpoint; copying one of another shape could broadcast it.

    Raises:
        ValueError: it is not of the model's shape.
    """
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and the model's {tuple(shape)}")
    return tensor


def copy_buffers(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads the persistent buffers and untrained parameters of `module`, which no engine partitions."""
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            buffer.data.copy_(fitting(tensors, f"model/{name}", buffer.shape))


def buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yields the persistent buffers of `module` as `model/NAME`."""
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield f"model/{name}", copied(buffer)


def copied(value: Tensor) -> Tensor:
    """Returns a copy on the CPU that shares nothing with `value`."""
    return value.detach().to("cpu", copy=True).contiguous()
