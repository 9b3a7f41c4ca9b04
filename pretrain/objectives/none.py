"""No self-supervised loss: the heads alone learn, in supervised training and fine-tuning.

Stretches of features are set to 0 (SpecAugment, arXiv 1904.08779), and the model itself is frozen at first, as
in wav2vec 2.0's fine-tuning (arXiv 2006.11477, §4.3: 10,000 updates of the output layer alone).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.self_supervision.masking import span_mask


@config
class Config(ObjectiveConfig):
    name: Literal["none"] = "none"
    frozen_steps: Annotated[int, about("number of updates at the start in which only the heads learn", ge=0)] = 0
    mask_time: Annotated[float, about("share of each utterance's features set to 0, in spans", ge=0, lt=1)] = 0.0
    mask_time_span: Annotated[int, about("feature frames per span", ge=1)] = 10
    mask_channels: Annotated[float, about("share of the feature channels set to 0, in spans", ge=0, lt=1)] = 0.0
    mask_channels_span: Annotated[int, about("channels per span", ge=1)] = 8

    @property
    def has_loss(self) -> bool:
        """Always False."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether `frozen_steps` is set."""
        return self.frozen_steps > 0

    def cautions(self, total_steps: int) -> list[str]:
        """Warns of a model that is never trained."""
        if self.frozen_steps < total_steps:
            return []
        return [
            f"objective.frozen_steps={self.frozen_steps}: with train.steps={total_steps} the model itself never learns"
        ]


@dataclass
class FeaturePlan(MicroBatchPlan):
    """hidden_BF, hidden_BC: bool, feature frames and channels set to 0; None: none are."""

    count: Tensor
    hidden_BF: Tensor | None
    hidden_BC: Tensor | None


class NoObjective(Objective):
    """Passes the encoder's output to the heads; its loss is 0 over 0 targets."""

    least_frames = 1

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config, self.channels = config, shape.feature_dim

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> FeaturePlan:
        settings, zero = self.config, torch.zeros((), dtype=torch.float64)
        lengths = model.frontend.feature_lengths(batch.lengths_B).tolist()
        hidden_BF = _hidden(
            batch, ctx, "hidden frames", lengths=lengths, share=settings.mask_time, span=settings.mask_time_span
        )
        channels = [self.channels] * len(lengths)
        hidden_BC = _hidden(
            batch,
            ctx,
            "hidden channels",
            lengths=channels,
            share=settings.mask_channels,
            span=settings.mask_channels_span,
        )
        return FeaturePlan(zero, hidden_BF, hidden_BC)

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, FeaturePlan)
        frozen = ctx.step < self.config.frozen_steps
        with torch.no_grad() if frozen else contextlib.nullcontext():
            features = model.extract(batch.wave_BT, batch.lengths_B)
            x_BFD = features.x_BFD
            if plan.hidden_BF is not None:
                width = x_BFD.shape[1]
                hidden_BF = torch.nn.functional.pad(plan.hidden_BF, (0, max(0, width - plan.hidden_BF.shape[1])))
                x_BFD = x_BFD.masked_fill(hidden_BF[:, :width, None], 0.0)
            if plan.hidden_BC is not None:
                x_BFD = x_BFD.masked_fill(plan.hidden_BC[:, None], 0.0)
            encoded: EncoderOutput = model.encoder(model.project(features._replace(x_BFD=x_BFD)), ctx)
        zero = torch.zeros((), device=batch.wave_BT.device)
        return LossOutput(zero, zero), encoded

    def monitoring(self) -> MonitoringRecord:
        return MonitoringRecord("loss/objective")


def _hidden(batch: Batch, ctx: StepContext, purpose: str, lengths: list[int], share: float, span: int) -> Tensor | None:
    """Draws spans of each row, (B, longest) bool, keyed by the segment; None where `share` is 0."""
    if not share:
        return None
    hidden = np.zeros((len(lengths), max(lengths, default=0)), dtype=bool)
    for row, (key, length) in enumerate(zip(batch.keys, lengths, strict=True)):
        rng = keyed_rng(ctx.seed, ctx.step, key, purpose)
        hidden[row, :length] = span_mask(length, share, span, rng, min_spans=0)
    return torch.from_numpy(hidden).to(batch.wave_BT.device)


def build(config: Config, shape: ModelShape) -> NoObjective:
    return NoObjective(config, shape)
