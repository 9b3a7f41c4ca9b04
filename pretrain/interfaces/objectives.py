"""What flows through a model, and the contracts of its parts.

Shape suffixes: B batch, T audio samples, F frames, D channels.
A parameter is used only inside `forward` of the module that owns it: ZeRO-3 gathers parameters there and nowhere else.
What modules pass to each other are named tuples, since ZeRO-3 looks for tensors in tuples only.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import SpeechModel

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

    Construct-time contract: `Objective(config, shape)`. It must be pure in (weights, batch, plan, ctx): the same
    context gives the same bits, whatever ran before.
    """

    couples: frozenset[str] = frozenset()
    targets_stand: bool = False
    """Whether its targets are there before the first update, and so can be judged at it."""
    exports_as: str = "Wav2Vec2"
    """Hugging Face's name for a model trained so, where the encoder is of no kind that has its own."""

    def attach(self, model: SpeechModel) -> None:
        """Runs once, when the model exists: an EMA teacher copies what it needs. Default: nothing."""

    @abc.abstractmethod
    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MicroBatchPlan:
        """Draws masks and counts targets; no gradient, no forward pass."""

    @abc.abstractmethod
    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """The loss summed over its targets, and the encoder's output for the heads."""

    def forget(self) -> None:
        """Throws away what forward passes collect for `after_step`. Runs before each attempt at an update.

        An attempt may fail, be computed again or be left out; `after_step` sees those of its own update alone.
        """

    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Runs after an update of the optimizer that was not left out (EMA teachers, code books)."""


class Head(nn.Module, abc.ABC):
    """A further task on the encoder's output. Construct-time contract: `Head(config, shape)`."""

    weight: float

    @abc.abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Number of targets of this batch, a scalar tensor."""

    @abc.abstractmethod
    def forward(self, encoded: EncoderOutput, batch: Batch) -> LossOutput:
        """The loss summed over its targets."""
