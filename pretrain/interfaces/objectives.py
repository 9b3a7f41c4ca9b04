"""Interfaces of objectives and heads, and what they exchange with the engine.

Shape suffixes: B batch, T audio samples, F frames, D channels.
A parameter is used only inside `forward` of the module that owns it: ZeRO-3 gathers parameters there and nowhere else.
Modules pass named tuples to each other, since ZeRO-3 looks for tensors in tuples only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import Frontend, SpeechModel
from pretrain.interfaces.monitoring import MicroBatchRecord, MonitoringRecord

Sum = tuple[Tensor, Tensor]
"""A sum and the count to divide it by, once, after both were added over micro-batches and ranks."""


class LossOutput(NamedTuple):
    """`total` is a sum over `count` targets, never a mean; metrics are sums and counts, too (detached)."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    metrics: Mapping[str, Sum] = {}


class MicroBatchPlan:
    """What `Objective.prepare` decided for one micro-batch (masks and the like). Objectives subclass it.

    count: number of targets, a scalar tensor. Known before the forward pass, so that the loss can be divided by the
    count of the whole global step.
    """

    count: Tensor


class Objective(nn.Module, abc.ABC):
    """A self-supervised loss; owns its encoder passes.

    Constructed as `Objective(config, shape)`. It is pure in (weights, batch, plan, ctx): the same context gives the
    same bits, whatever ran before. Every micro-batch is valid input: utterances too short for a frame or a mask have
    no targets and leave the others' losses unchanged.
    """

    couples: frozenset[str] = frozenset()
    """Contract checks that cannot hold by design: "padding", "batch" (the loss depends on the batch's other rows)."""
    least_frames: int = 2
    """Encoder frames below which an utterance can have no target: one masked, one visible."""
    exports_as: str = "Wav2Vec2"
    """Hugging Face's name for a model trained so, where the encoder is of no kind that has its own."""
    _recording: bool = False
    _last: MicroBatchRecord | None = None

    def attach(self, model: SpeechModel) -> None:
        """Runs once, when the model exists: an EMA teacher copies what it needs. Default: nothing."""

    def least_samples(self, frontend: Frontend) -> int:
        """Returns the shortest utterance, in samples, that can have a target with this front end."""
        return frontend.least_samples(self.least_frames)

    @abc.abstractmethod
    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MicroBatchPlan:
        """Draws masks and counts targets; no gradient, no forward pass.

        Args:
            model: front end and encoder, for the number of frames of each utterance.
            batch: one micro-batch, padded to at least `least_samples`.
            ctx: seed and step that key the draws.

        Returns:
            The plan that `forward` takes.
        """

    @abc.abstractmethod
    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """Computes the loss of one micro-batch.

        Args:
            model: front end and encoder.
            batch: the micro-batch that `plan` was prepared for.
            plan: what `prepare` returned.
            ctx: seed and step.

        Returns:
            The loss summed over its targets, and the encoder's output for the heads, (B, F, D) per layer.
        """

    def forget(self) -> None:
        """Discards what forward passes collect for `after_step`. Runs before each attempt at an update.

        An attempt may fail, be computed again or be left out; `after_step` sees those of its own update alone.
        """

    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Runs after an update of the optimizer that was not left out (EMA teachers, code books)."""

    @abc.abstractmethod
    def monitoring(self) -> MonitoringRecord:
        """Returns what can be monitored; `last` holds the micro-batch recorded since `record_next`."""

    def record_next(self) -> None:
        """Asks the next forward pass to keep its targets and predictions for `monitoring`."""
        self._recording, self._last = True, None

    def record(self, make: Callable[[], MicroBatchRecord]) -> None:
        """For `forward`: keeps the record that `make` returns, where one was asked for. Costs nothing otherwise."""
        if self._recording:
            self._recording = False
            with torch.no_grad():
                self._last = make().detached()


class Head(nn.Module, abc.ABC):
    """A further task on the encoder's output. Constructed as `Head(config, shape)`."""

    weight: float
    """Weight of its loss beside the objective's."""

    @abc.abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Returns the number of targets of this batch, a scalar tensor."""

    @abc.abstractmethod
    def forward(self, encoded: EncoderOutput, batch: Batch) -> LossOutput:
        """Returns the loss summed over its targets."""
