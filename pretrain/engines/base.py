"""One optimizer step, common to all engines: prepare, count, forward and backward, reduce, update."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.loss_scaler import LossScale
from pretrain.engines.signals import RankSignals
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.nn.dropout import seed_dropout
from pretrain.train_module import TrainModule

NumpySum = tuple[np.ndarray, float]


SAMPLES = "data/micro_batch_samples"
"""Metric of the unpadded samples trained on; its count is the number of micro-batches."""


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """Loss and metrics of held-out audio, summed over micro-batches and ranks; the same on every rank."""

    loss: float
    metrics: Mapping[str, NumpySum]
    """name -> (sum, count)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one global step, summed over micro-batches and ranks; the same on every rank."""

    loss: float
    metrics: Mapping[str, NumpySum]
    """name -> (sum, count)."""
    signals: RankSignals
    """Signals of all ranks, summed."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: bool = False
    """Whether the update was left out as an outlier; weights and moments are then unchanged."""

    @property
    def samples(self) -> int:
        """Unpadded audio samples of the update, over all ranks."""
        return round(float(self.metrics[SAMPLES][0][0]))


class Engine(abc.ABC):
    """Runs optimizer steps on a TrainModule.

    The loss is Σ sums / Σ counts over the whole global step, so it does not depend on how the step's micro-batches
    are distributed over ranks and accumulation slots.

    Args:
        module: the model, on this rank's device; all ranks hold equal weights.
        config: precision, gradients and checks of the engine.
        optimizer: AdamW's settings and the limit of the gradient norm.
        world: this process's rank, the number of ranks and the device.
    """

    module: TrainModule

    def __init__(
        self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, world: DistributedContext
    ) -> None:
        self.module, self.config, self.optimizer_config, self.world = module, config, optimizer, world
        self.scale = LossScale(config.precision)
        self._memory: dict[str, Any] = {}
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Called with the name of each phase of a step when it starts; shows which rank hangs and which ones wait."""
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
        """Performs one optimizer update; a collective operation.

        Args:
            batches: this rank's micro-batches of the global step, one per accumulation slot; the first is not empty.
            ctx: seed and step, which key all draws.
            lr: learning rate of this update.
            signals: this rank's signals to the other ranks; reduced together with the metrics.
            skip_above: gradient norm above which weights and moments are not updated; the same on all ranks.
            check: receives the summed metrics and signals before the update; it must raise on all ranks or on none.

        Returns:
            Loss, metrics and signals, summed over micro-batches and ranks.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite. Weights may be damaged: roll back to a
                checkpoint.
        """
        self.module.train()
        self.module.begin(ctx)
        signals = signals or RankSignals(wait_seconds=(0.0,) * self.world.size)

        # prepare and count: the loss of every micro-batch is divided by the targets of the whole global step
        batches = [batch.to(self.world.device) for batch in batches]
        plans, counts_K = self._prepare(batches, ctx)

        while True:
            # forward and backward: gradients add up over this rank's micro-batches
            loss, totals = self._accumulate(batches, plans, counts_K, ctx)

            # reduce: loss, metrics and signals of all ranks in one tensor
            self.on_phase("sum of losses")
            total_loss, metrics, received = self._reduce(loss, totals, signals)
            if not np.isfinite(total_loss):
                self._apply(lr, -math.inf)  # discards the gradients
                raise FloatingPointError(f"the loss of step {ctx.step} is {total_loss}")
            if check is not None:
                check(metrics, received)

            # update: sum the gradients over ranks, clip, AdamW; after an fp16 overflow again at half the loss scale
            self.on_phase("update")
            grad_norm = self._apply(lr, skip_above)
            if np.isfinite(grad_norm):
                break
            if not self.scale.lower():
                raise FloatingPointError(f"the gradient norm of step {ctx.step} is {grad_norm}")
        self.scale.fitted()
        skipped = grad_norm > skip_above
        if not skipped:
            self.module.after_step(ctx, metrics)
        return StepResult(total_loss, metrics, received, grad_norm, skipped)

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], counted: int, ctx: StepContext) -> HeldOutResult:
        """Computes the loss of audio that is not trained on; a collective operation.

        The module is in evaluation mode: no dropout, no layer drop, arg max instead of sampled codes. Weights, moments,
        teachers, code books, torch's random state and what an objective collects are the same afterwards.

        Args:
            batches: this rank's micro-batches; as many on every rank.
            counted: number of micro-batches, from the first, that enter the loss; the rest keep the ranks in lockstep.
            ctx: keys the masks.

        Returns:
            Loss and metrics, summed over the counted micro-batches of all ranks.
        """
        on_gpu = self.world.device.startswith("cuda")
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            self.module.eval()
            try:
                batches = [batch.to(self.world.device) for batch in batches]
                plans = [self.module.prepare(batch, ctx) for batch in batches]
                counts_K = torch.stack([plan.counts_K * (n < counted) for n, plan in enumerate(plans)]).sum(0)
                counts_K = self.world.sum_on_host(counts_K)
                loss, totals = torch.zeros((), dtype=torch.float64, device=self.world.device), dict[str, list[Tensor]]()
                for number, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
                    share = float(number < counted)
                    micro_loss, metrics = self._forward(batch, plan, counts_K, ctx)
                    loss += micro_loss.double() * share
                    add_sums(totals, {name: (total * share, count * share) for name, (total, count) in metrics.items()})
                total_loss, sums, _ = self._reduce(loss, totals, RankSignals())
            finally:
                self.module.train()
        return HeldOutResult(total_loss, sums)

    def _prepare(self, batches: Sequence[Batch], ctx: StepContext) -> tuple[Sequence[object], Tensor]:
        """Draws masks and counts targets, without a forward pass; returns plans and the targets over all ranks."""
        self.on_phase("targets")
        plans = [self.module.prepare(batch, ctx) for batch in batches]
        self.on_phase("sum of counts")
        return plans, self.world.sum_on_host(torch.stack([plan.counts_K for plan in plans]).sum(0))

    def _accumulate(
        self, batches: Sequence[Batch], plans: Sequence[object], counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Accumulates the gradients of this rank's micro-batches; returns their share of the loss and metric sums."""
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        totals: dict[str, list[Tensor]] = {}
        self.module.forget()
        for batch, plan in zip(batches, plans, strict=True):
            seed_dropout(ctx, batch.micro_batch, batch.wave_BT.device)
            self.on_phase("forward pass")
            micro_loss, metrics = self._forward_backward(batch, plan, counts_K, ctx)
            loss += micro_loss.detach().double()
            if batch.is_empty:
                continue
            add_sums(totals, metrics)
            add_sums(totals, {SAMPLES: (batch.lengths_B.sum(), torch.ones((), device=batch.lengths_B.device))})
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

    def memory(self) -> dict[str, Any]:
        """Returns what a resume needs beside tensors and the loss scale, as plain JSON.

        Engines without a memory of their own keep that of the checkpoint, such as the spent budget of a federated run.
        """
        return dict(self._memory)

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `memory` returned, also that of another engine.

        Raises:
            ValueError: it has another form.
        """
        self._memory = dict(memory)

    @abc.abstractmethod
    def _forward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        """Returns this micro-batch's share of the global loss, and its metrics."""

    @abc.abstractmethod
    def _forward_backward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        """Adds this micro-batch's gradient, times `scale`; returns its share of the global loss, and its metrics.

        Calls `on_phase` before the backward pass.
        """

    @abc.abstractmethod
    def _apply(self, lr: float, skip_above: float) -> float:
        """Sums gradients over ranks, divides by `scale`, clips, and updates unless the norm is above `skip_above`.

        Returns the gradient norm before clipping. If it is not finite, the gradients are discarded.
        """

    @abc.abstractmethod
    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yields copies of all weights and buffers (`model/NAME`) and moments (`MOMENT/NAME`), whole, fp32, on the CPU.

        A collective operation: all ranks iterate in lockstep. Together with `load_tensors` it makes the checkpoint
        format independent of engine, ZeRO stage and number of ranks.

        Yields:
            (name, tensor on the CPU in its unpartitioned shape: fp32, buffers in their own dtype); the same names in
            the same order on every rank. MOMENT is exp_avg or exp_avg_sq, of trained parameters only.
        """

    @abc.abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Loads the tensors that `tensors` yielded after `step` updates, bit for bit; a collective operation.

        Args:
            tensors: all names of `tensors`, whole, on the CPU; read one by one, so that they may be mapped from a file.
            step: updates done; with 0 no moments are needed.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape than the model's.
        """


def add_sums(totals: dict[str, list[Tensor]], metrics: Mapping[str, Sequence[Tensor]]) -> None:
    """Adds the sum and the count of each metric to those in `totals`, in place, in fp64."""
    for name, parts in metrics.items():
        if name in totals:
            totals[name] = [old + new.double() for old, new in zip(totals[name], parts, strict=True)]
        else:
            totals[name] = [part.double() for part in parts]


def fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Returns a tensor of a checkpoint after checking its shape, since copying another one could broadcast it.

    Raises:
        ValueError: the shape differs from the model's.
    """
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model expects {tuple(shape)}")
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
            yield f"model/{name}", host_copy(buffer)


def host_copy(value: Tensor) -> Tensor:
    """Returns a copy on the CPU that shares no memory with `value`."""
    return value.detach().to("cpu", copy=True).contiguous()
