"""A contrastive objective over masked frames and over the same speech at another speed.

Each utterance has two views: the original, and one whose segments have speeds of their own. In both, the feature of a
masked frame is contrasted with those of other masked frames of its utterance (frame InfoNCE, as in wav2vec 2.0, arXiv
2006.11477, but on continuous targets, as in CPC, arXiv 1807.03748), and its output with frames of the other view, of
which the frame at the same instant is the positive (temporal InfoNCE). The alignment follows from the speeds: monotone
and piecewise linear. Negatives from the positive's own acoustic cluster (k-means of MFCC, fitted after the first
update) are excluded, since they may be the same phone. There is no published release to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import about, config
from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import Frontend, ModelShape, SpeechModel, shortest_input
from pretrain.interfaces.monitoring import CODE_COUNTS, MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.numerics import full_precision, histogram, rate_ratio, stack_frames
from pretrain.nn.spectral import TorchaudioMfcc
from pretrain.self_supervision.contrastive import (
    chance_levels,
    contrast_logits,
    contrastive_loss,
    contrastive_record,
    nearest_units,
)
from pretrain.self_supervision.deferred_fit import FittedOnce
from pretrain.self_supervision.kmeans import from_first_rank, kmeans
from pretrain.self_supervision.masked_prediction import feature_penalty
from pretrain.self_supervision.masking import FrameMask, draw_negatives, draw_span_mask
from pretrain.self_supervision.quantizers import nearest_codes
from pretrain.self_supervision.teacher import deviation
from pretrain.self_supervision.time_warp import Warp, draw_warp, warped


@config
class Config(ObjectiveConfig):
    name: Literal["time_contrastive"] = "time_contrastive"
    mask_prob: Annotated[float, about("share of frames in masked spans, counted before overlaps", gt=0, le=1)] = 0.65
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 10
    slowest: Annotated[float, about("lowest speed of the second view", ge=0.5, le=1)] = 0.8
    fastest: Annotated[float, about("highest speed of the second view", ge=1, le=2)] = 1.25
    clusters: Annotated[
        int, about("acoustic clusters; negatives from the positive's own cluster are excluded", ge=2)
    ] = 100
    projection_dim: Annotated[int, about("dimensions in which frames are compared", ge=1)] = 256
    negatives: Annotated[int, about("distractors per masked frame, from the same utterance's masked frames", ge=1)] = (
        100
    )
    logit_temperature: Annotated[float, about("divisor of the cosine similarity", gt=0)] = 0.1
    temporal_weight: Annotated[float, about("weight of the loss between the views", ge=0)] = 1.0
    segment_seconds: Annotated[
        float, about("mean length of a segment with one speed; 0: an utterance has one", ge=0)
    ] = 0.0
    compared: Annotated[
        Literal["projection", "output"],
        about("what the loss between the views compares: a projection of the encoder's output, or the output itself"),
    ] = "projection"
    penalty_weight: Annotated[float, about("weight of the mean square of a stem's output", ge=0)] = 10.0

    @property
    def gives_own_output(self) -> bool:
        """Always False: heads get the original audio, without the other view."""
        return False


@dataclass
class ViewsPlan(MicroBatchPlan):
    """Draws for R = 2·B rows: the utterances, then the same at another speed."""

    views: Batch
    mask: FrameMask
    negatives_RMK: Tensor
    partner_RF: Tensor
    """For each frame the index into R·F of the frame at the same instant in the other view."""
    count: Tensor


class TimeContrastive(Objective):
    """Loss: frame InfoNCE + temporal_weight · temporal InfoNCE + penalty_weight · feature penalty, per masked frame."""

    least_frames = 3  # two masked, so that each has a negative, and one visible

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        self.ratio = rate_ratio(shape.feature_rate_hz, shape.rate_hz)
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim))
        self.project_target = nn.Linear(shape.feature_dim * self.ratio, config.projection_dim)
        self.project_prediction = nn.Linear(shape.dim, config.projection_dim)
        if config.compared == "projection":
            self.project_view = nn.Linear(shape.dim, config.projection_dim)
        self.mfcc = TorchaudioMfcc()
        self.mfcc_ratio = rate_ratio(self.mfcc.rate_hz, shape.rate_hz)
        self.register_buffer("centres_KD", torch.randn(config.clusters, self.mfcc.dim))
        self.centres_KD: Tensor
        self.fit = FittedOnce()

    def least_samples(self, frontend: Frontend) -> int:
        """Returns the shortest utterance whose fastest view is long enough; plus one sample, as lengths are rounded."""
        shortest = max(super().least_samples(frontend), shortest_input(self.mfcc.lengths))
        return math.ceil(shortest * self.config.fastest) + 1

    def forget(self) -> None:
        self.fit.forget()

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> ViewsPlan:
        slowest, fastest = self.config.slowest, self.config.fastest
        warps = [
            draw_warp(
                keyed_rng(ctx.seed, ctx.step, key, "speed"), length, slowest, fastest, self.config.segment_seconds
            )
            for key, length in zip(batch.keys, batch.lengths_B.tolist(), strict=True)
        ]
        views = with_other_speeds(batch, warps)
        mask = draw_span_mask(model.frontend, views, ctx, self.config.mask_prob, self.config.mask_span, least=2)
        negatives_RMK = draw_negatives(mask, views.keys, ctx, self.config.negatives)
        lengths_R = model.frontend.frame_lengths(views.lengths_B)
        partner_RF = partners(lengths_R, warps, mask.mask_BF.shape[1], SAMPLE_RATE / model.shape.rate_hz)
        partner_RF = partner_RF.to(batch.wave_BT.device, non_blocking=True)
        return ViewsPlan(views, mask, negatives_RMK, partner_RF, mask.count)

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """Computes the loss of one micro-batch over both views, see `Objective.forward`.

        Returns:
            The loss, and the encoder's output for the original utterances, (B, F, D) per layer.
        """
        assert isinstance(plan, ViewsPlan)
        mask, config = plan.mask, self.config
        features = model.extract(plan.views.wave_BT, plan.views.lengths_B)
        frames = model.project(features)
        x_RFD = torch.where(mask.mask_BF[:, :, None], self.mask_embedding.to(frames.x_BFD.dtype), frames.x_BFD)
        encoded: EncoderOutput = model.encoder(Frames(x_RFD, frames.lengths_B, frames.rate_hz), ctx)

        targets_ND = self.project_target(stack_frames(features, self.ratio).x_BFD.flatten(0, 1)[mask.flat_N])
        output_XD = encoded.final.x_BFD.flatten(0, 1)
        partner_N = plan.partner_RF.flatten()[mask.flat_N]
        predictions_ND = self.project_prediction(output_XD[mask.flat_N])
        view_ND, other_ND = output_XD[mask.flat_N], output_XD[partner_N]
        if config.compared == "projection":
            view_ND, other_ND = self.project_view(view_ND), self.project_view(other_ND)
        cluster_N = self.clusters(batch, plan).flatten()[mask.flat_N]

        count = plan.count.to(x_RFD.device)
        with full_precision(x_RFD.device):
            shared = (cluster_N, mask, plan.negatives_RMK, config.logit_temperature)
            frame_logits_RMK = contrast_logits(predictions_ND, targets_ND, *shared)
            frame, hits = contrastive_loss(frame_logits_RMK, mask.valid_BM)
            chance_loss, chance_accuracy = chance_levels(frame_logits_RMK, plan.negatives_RMK, mask.valid_BM)
            temporal, found = contrastive_loss(contrast_logits(view_ND, other_ND, *shared), mask.valid_BM)
            penalty = feature_penalty(features, mask)
            total = frame + config.temporal_weight * temporal + config.penalty_weight * penalty
        metrics = {
            "loss/contrastive": (frame, count),
            "loss/temporal": (temporal, count),
            "loss/feature_penalty": (penalty, count),
            "metric/accuracy": (hits, count),
            "metric/chance_loss": (chance_loss, count),
            "metric/chance_accuracy": (chance_accuracy, count),
            "metric/temporal_accuracy": (found, count),
            "metric/masked_share": (count, encoded.lengths_B.sum()),
            "health/target_std": (deviation(targets_ND) * count, count),
            "health/prediction_std": (deviation(predictions_ND) * count, count),
            CODE_COUNTS: (histogram(cluster_N, config.clusters), count),
        }

        def originals() -> MicroBatchRecord:
            mask_BF = mask.mask_BF[: len(batch.keys)]
            predicted_N = nearest_units(predictions_ND, targets_ND, cluster_N, mask)
            n = int(mask_BF.sum())
            return MicroBatchRecord(mask_BF, cluster_N[:n], predicted_N[:n], targets_ND[:n], predictions_ND[:n])

        self.record(originals)
        return LossOutput(total, count, metrics), first_rows(encoded, len(batch.keys))

    def monitoring(self) -> MonitoringRecord:
        return contrastive_record((self.config.clusters,), self._last)

    @torch.no_grad()
    def clusters(self, batch: Batch, plan: ViewsPlan) -> Tensor:
        """Returns the acoustic cluster of every frame of both views, (R, F): that of the original's frame in both."""
        mfcc = self.mfcc(batch.wave_BT, batch.lengths_B)
        if self.fit.due:
            self.fit.rows[batch.micro_batch] = mfcc.x_BFD[mfcc.valid_BF()]
        R, width = plan.mask.mask_BF.shape
        thinned_BFD = mfcc.x_BFD[:, :: self.mfcc_ratio]
        thinned_BFD = F.pad(thinned_BFD, (0, 0, 0, max(width - thinned_BFD.shape[1], 0)))[:, :width]
        found_BF = nearest_codes(thinned_BFD.flatten(0, 1), self.centres_KD).view(R // 2, width)
        return torch.cat([found_BF, found_BF.flatten()[plan.partner_RF[R // 2 :]]])

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Fits the clusters to the frames of the first update."""
        if (rows_ND := self.fit.take()) is not None:
            seed = keyed_seed(ctx.seed, "clusters")
            self.centres_KD.copy_(from_first_rank(kmeans(rows_ND, len(self.centres_KD), seed)))


def with_other_speeds(batch: Batch, warps: Sequence[Warp]) -> Batch:
    """Appends to B utterances their copies at other speeds.

    Args:
        batch: (B, T) audio.
        warps: of the B copies.

    Returns:
        R = 2·B rows; the keys of the copies end in " speed".
    """
    changed = [
        warped(wave_T[:length], warp)
        for wave_T, length, warp in zip(batch.wave_BT, batch.lengths_B.tolist(), warps, strict=True)
    ]
    lengths_R = torch.cat([batch.lengths_B, batch.lengths_B.new_tensor([len(wave_T) for wave_T in changed])])
    wave_RT = batch.wave_BT.new_zeros(len(lengths_R), max(batch.wave_BT.shape[1], *map(len, changed)))
    for row, wave_T in enumerate((*batch.wave_BT, *changed)):
        wave_RT[row, : len(wave_T)] = wave_T
    keys = (*batch.keys, *(f"{key} speed" for key in batch.keys))
    return Batch(wave_RT, lengths_R, keys, batch.micro_batch)


def partners(lengths_R: Tensor, warps: Sequence[Warp], width: int, samples: float) -> Tensor:
    """Returns for each frame the index into R·width of the frame of the other view at the same instant, (R, width).

    It is the frame that contains the instant at the middle of this one, limited to that view's last frame.

    Args:
        lengths_R: frames of each row: the originals, then the other views.
        warps: of the B other views.
        width: number of frames F of the padded views.
        samples: per frame.
    """
    middle_F = (np.arange(width) + 0.5) * samples
    at_RF = np.stack([w.to_view(middle_F) for w in warps] + [w.to_original(middle_F) for w in warps])
    other_R = torch.arange(2 * len(warps)).roll(len(warps))
    last_R1 = (lengths_R[other_R] - 1).clamp(min=0)[:, None]
    return other_R[:, None] * width + torch.minimum(torch.from_numpy(at_RF / samples).long(), last_R1)


def first_rows(encoded: EncoderOutput, rows: int) -> EncoderOutput:
    """Returns the encoder's output for the first `rows` rows."""
    layers = tuple(layer[:rows] for layer in encoded.layers)
    ffn_layers = tuple(layer[:rows] for layer in encoded.ffn_layers)
    return EncoderOutput(layers, encoded.lengths_B[:rows], encoded.rate_hz, ffn_layers)


def build(config: Config, shape: ModelShape) -> TimeContrastive:
    return TimeContrastive(config, shape)
