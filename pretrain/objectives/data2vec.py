"""data2vec: regress the layers of an EMA teacher at masked frames (arXiv 2202.03555, §3)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.self_supervision.masking import MaskedPlan, draw_span_mask
from pretrain.self_supervision.teacher import (
    Teacher,
    all_but_positions,
    annealed_decay,
    averaged_layers,
    deviation,
    layer_teacher,
)


@config
class Config(ObjectiveConfig):
    name: Literal["data2vec"] = "data2vec"
    mask_prob: Annotated[float, about("share of frames in masked spans, counted before overlaps", gt=0, le=1)] = 0.65
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 10
    top_layers: Annotated[int, about("number of last layers of the teacher that are averaged", ge=1)] = 8
    ema_start: Annotated[float, about("EMA decay at the first update", ge=0, le=1)] = 0.999
    ema_end: Annotated[float, about("EMA decay after ema_steps updates", ge=0, le=1)] = 0.9999
    ema_steps: Annotated[int, about("updates over which the decay rises linearly", ge=1)] = 30_000


class Data2Vec(Objective):
    """Regresses the averaged layers of an EMA teacher, which encodes the unmasked frames of the same front end.

    The teacher's positional weights are copied from the encoder, not averaged.

    Target (§3.3): feed-forward outputs of the last `top_layers` blocks before their residual sum, each normalised over
    time per channel, averaged. Loss (§3.4, L2): squared error / √D, summed over channels, per masked frame.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config, self.dim = config, shape.dim
        self.top_layers = min(config.top_layers, shape.n_layers)
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim))
        self.regression = nn.Linear(shape.dim, shape.dim)
        self.teacher: Teacher | None = None

    def attach(self, model: SpeechModel) -> None:
        self.teacher = layer_teacher(model)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MaskedPlan:
        mask = draw_span_mask(model.frontend, batch, ctx, self.config.mask_prob, self.config.mask_span)
        return MaskedPlan(mask, mask.count)

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, MaskedPlan)
        frames = model.project(model.extract(batch.wave_BT, batch.lengths_B))
        targets_ND = self.targets(frames).flatten(0, 1)[plan.mask.flat_N]
        x_BFD = torch.where(plan.mask.mask_BF[:, :, None], self.mask_embedding.to(frames.x_BFD.dtype), frames.x_BFD)
        encoded: EncoderOutput = model.encoder(Frames(x_BFD, frames.lengths_B, frames.rate_hz), ctx)
        predictions_ND = self.regression(encoded.final.x_BFD.flatten(0, 1)[plan.mask.flat_N]).float()
        total = (predictions_ND - targets_ND).square().sum() / math.sqrt(self.dim)
        count = plan.count.to(x_BFD.device)
        metrics = {
            "metric/masked_share": (count, encoded.lengths_B.sum()),
            "health/target_std": (deviation(targets_ND) * count, count),
            "health/prediction_std": (deviation(predictions_ND) * count, count),
        }
        self.record(lambda: MicroBatchRecord(plan.mask.mask_BF, None, None, targets_ND, predictions_ND))
        return LossOutput(total, count, metrics), encoded

    @torch.no_grad()
    def targets(self, frames: Frames) -> Tensor:
        """Returns the teacher's targets for (B, F, D) frames, (B, F, D) fp32."""
        assert self.teacher is not None
        output: EncoderOutput = self.teacher.copy(Frames(frames.x_BFD.detach(), frames.lengths_B, frames.rate_hz))
        return averaged_layers(output, self.top_layers)

    def monitoring(self) -> MonitoringRecord:
        return MonitoringRecord.of_regression(self._last)

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        assert self.teacher is not None
        decay = annealed_decay(ctx.step, self.config.ema_start, self.config.ema_end, self.config.ema_steps)
        self.teacher.follow(model.encoder, decay, all_but_positions)


def build(config: Config, shape: ModelShape) -> Data2Vec:
    return Data2Vec(config, shape)
