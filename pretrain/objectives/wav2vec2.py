"""wav2vec 2.0: pick the quantised feature of a masked frame among those of other masked frames (arXiv 2006.11477)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import CODE_COUNTS, MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.dropout import Dropout
from pretrain.nn.numerics import full_precision, histogram, rate_ratio, stack_frames
from pretrain.self_supervision.contrastive import (
    chance_levels,
    contrast_logits,
    contrastive_loss,
    contrastive_record,
    nearest_units,
)
from pretrain.self_supervision.masked_prediction import feature_penalty
from pretrain.self_supervision.masking import MaskedPlan, draw_negatives, draw_span_mask
from pretrain.self_supervision.quantizers import GumbelQuantizer, Quantized, perplexity
from pretrain.self_supervision.teacher import deviation


@config
class Config(ObjectiveConfig):
    name: Literal["wav2vec2"] = "wav2vec2"
    mask_prob: Annotated[float, about("share of frames in masked spans, counted before overlaps", gt=0, le=1)] = 0.65
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 10
    groups: Annotated[int, about("codebook groups G", ge=1)] = 2
    n_codes: Annotated[int, about("codes V of each group", ge=2)] = 320
    code_dim: Annotated[int, about("dimensions of a quantised frame, all groups together", ge=1)] = 256
    projection_dim: Annotated[int, about("dimensions in which prediction and target are compared", ge=1)] = 256
    negatives: Annotated[int, about("distractors per masked frame, from the same utterance's masked frames", ge=1)] = (
        100
    )
    logit_temperature: Annotated[float, about("divisor of the cosine similarity", gt=0)] = 0.1
    gumbel_temperature: Annotated[float, about("Gumbel temperature at the first update", gt=0)] = 2.0
    gumbel_temperature_min: Annotated[float, about("lower limit of the Gumbel temperature", gt=0)] = 0.5
    gumbel_decay: Annotated[float, about("factor of the Gumbel temperature per update", gt=0, le=1)] = 0.999995
    diversity_weight: Annotated[float, about("weight of the codebook diversity loss", ge=0)] = 0.1
    penalty_weight: Annotated[float, about("weight of the mean square of the stem's output", ge=0)] = 10.0
    feature_dropout: Annotated[float, about("dropout on the quantiser's input", ge=0, lt=1)] = 0.1


@dataclass
class ContrastivePlan(MaskedPlan):
    negatives_BMK: Tensor
    """Negatives of each masked frame, as positions within M."""


class Wav2Vec2(Objective):
    """Contrasts the encoder's output at masked frames with quantised features of the unmasked front end.

    Loss (eq. 2 to 4): InfoNCE over K negatives from the same utterance's masked frames, plus the diversity of the code
    distribution, plus fairseq's penalty on the mean square of the stem's output.
    """

    least_frames = 3  # two masked, so that each has a negative, and one visible

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        # diversity is a function of the whole micro-batch's mean code distribution
        self.couples = frozenset({"batch"}) if config.diversity_weight else frozenset()
        self.ratio = rate_ratio(shape.feature_rate_hz, shape.rate_hz)
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim))
        self.feature_dropout = Dropout(config.feature_dropout)
        self.quantizer = GumbelQuantizer(shape.feature_dim * self.ratio, config.code_dim, config.groups, config.n_codes)
        self.project_target = nn.Linear(config.code_dim, config.projection_dim)
        self.project_prediction = nn.Linear(shape.dim, config.projection_dim)

    def temperature(self, step: int) -> float:
        """Returns the Gumbel temperature after `step` updates."""
        return max(self.config.gumbel_temperature * self.config.gumbel_decay**step, self.config.gumbel_temperature_min)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> ContrastivePlan:
        mask = draw_span_mask(model.frontend, batch, ctx, self.config.mask_prob, self.config.mask_span, least=2)
        return ContrastivePlan(mask, mask.count, draw_negatives(mask, batch.keys, ctx, self.config.negatives))

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """Computes contrastive + diversity_weight · diversity + penalty_weight · feature penalty (eq. 2 to 4).

        The last two are means, weighted by the number of masked frames (fairseq `Wav2vecCriterion`), so that the sum
        over a global step can be divided by its masked frames.
        """
        assert isinstance(plan, ContrastivePlan)
        mask = plan.mask
        features = model.extract(batch.wave_BT, batch.lengths_B)
        frames = model.project(features)
        x_BFD = torch.where(mask.mask_BF[:, :, None], self.mask_embedding.to(frames.x_BFD.dtype), frames.x_BFD)
        encoded: EncoderOutput = model.encoder(Frames(x_BFD, frames.lengths_B, frames.rate_hz), ctx)

        stacked_BFD = stack_frames(features, self.ratio).x_BFD
        unmasked_ND = self.feature_dropout(stacked_BFD.flatten(0, 1)[mask.flat_N])
        quantized: Quantized = self.quantizer(unmasked_ND, self.temperature(ctx.step))
        targets_ND = self.project_target(quantized.codes_ND)
        predictions_ND = self.project_prediction(encoded.final.x_BFD.flatten(0, 1)[mask.flat_N])

        count, codes_N = plan.count.to(x_BFD.device), self.joint_codes(quantized.index_NG)
        with full_precision(x_BFD.device):
            logits_BMK = contrast_logits(
                predictions_ND,
                targets_ND,
                codes_N,
                mask=mask,
                negatives_BMK=plan.negatives_BMK,
                temperature=self.config.logit_temperature,
            )
            chance_loss, chance_accuracy = chance_levels(logits_BMK, plan.negatives_BMK, mask.valid_BM)
            contrastive, hits = contrastive_loss(logits_BMK, mask.valid_BM)
            n_codes = self.config.groups * self.config.n_codes
            code_perplexity = perplexity(quantized.probs_NGV)
            diversity = (n_codes - code_perplexity) / n_codes * len(unmasked_ND)
            penalty = feature_penalty(features, mask)
            total = contrastive + self.config.diversity_weight * diversity + self.config.penalty_weight * penalty
        offsets_G = torch.arange(self.config.groups, device=total.device) * self.config.n_codes
        code_counts = histogram((quantized.index_NG + offsets_G).flatten(), n_codes)
        metrics = {
            "loss/contrastive": (contrastive, count),
            "loss/diversity": (diversity, count),
            "loss/feature_penalty": (penalty, count),
            "metric/accuracy": (hits, count),
            "metric/chance_loss": (chance_loss, count),
            "metric/chance_accuracy": (chance_accuracy, count),
            "metric/masked_share": (count, encoded.lengths_B.sum()),
            "metric/soft_perplexity": (code_perplexity * count, count),
            "health/target_std": (deviation(targets_ND) * count, count),
            "health/prediction_std": (deviation(predictions_ND) * count, count),
            CODE_COUNTS: (code_counts, count * self.config.groups),
        }
        self.record(
            lambda: MicroBatchRecord(
                mask_BF=mask.mask_BF,
                target_units_N=codes_N,
                predicted_units_N=nearest_units(predictions_ND, targets_ND, codes_N, mask),
                targets_ND=targets_ND,
                predictions_ND=predictions_ND,
            )
        )
        return LossOutput(total, count, metrics), encoded

    def monitoring(self) -> MonitoringRecord:
        return contrastive_record((self.config.n_codes,) * self.config.groups, self._last)

    def joint_codes(self, index_NG: Tensor) -> Tensor:
        """Combines each frame's codes of all groups to one number, (N,), by which negatives are excluded."""
        code_N = index_NG[:, 0]
        for group in range(1, index_NG.shape[1]):
            code_N = code_N * self.config.n_codes + index_NG[:, group]
        return code_N


def build(config: Config, shape: ModelShape) -> Wav2Vec2:
    return Wav2Vec2(config, shape)
