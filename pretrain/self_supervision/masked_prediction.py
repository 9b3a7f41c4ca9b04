"""Masked unit prediction, shared by HuBERT, WavLM and `efficient`: classify the acoustic unit of each masked frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError, about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import FrameLabels, ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import Frontend, ModelShape, SpeechModel, shortest_input
from pretrain.interfaces.monitoring import CODE_COUNTS, MicroBatchRecord, MonitoringRecord, books_of
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.numerics import full_precision, histogram, rate_ratio, stack_frames
from pretrain.nn.spectral import LogMel, TorchaudioMfcc
from pretrain.self_supervision.deferred_fit import FittedOnce
from pretrain.self_supervision.kmeans import from_first_rank, kmeans
from pretrain.self_supervision.masking import FrameMask, MaskedPlan, draw_span_mask, frame_width
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer, nearest_codes
from pretrain.self_supervision.teacher import Teacher


@config
class MaskedUnitsConfig(ObjectiveConfig):
    """Configuration of masked unit prediction.

    Units are either frame labels of the batch, or computed during the run by k-means on the frames of one update.
    """

    labels: Annotated[str, about("name of the frame labels in the data; empty: units are computed during the run")] = ""
    label_rate_hz: Annotated[float, about("rate of the frame labels in the data", gt=0)] = 50.0
    units: Annotated[int, about("number of units K", ge=2)] = 100
    features: Annotated[
        Literal["mfcc", "log_mel", "best_rq"],
        about(
            "the first units: k-means clusters of MFCC or log-mel frames, or random codes of PCA-whitened "
            "log-mel; fitted to the first update's frames"
        ),
    ] = "mfcc"
    relabel_step: Annotated[
        int,
        about(
            "after this update (or the next that is not skipped), units are k-means clusters of a layer of the "
            "model itself; 0: never",
            ge=0,
        ),
    ] = 0
    relabel_layer: Annotated[int, about("the layer that is clustered; 1 is the first block's output", ge=1)] = 6
    relabel_units: Annotated[int, about("number of units after the relabelling; 0: unchanged", ge=0)] = 0
    mask_prob: Annotated[float, about("share of frames in masked spans, counted before overlaps", gt=0, le=1)] = 0.8
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 10
    projection_dim: Annotated[
        int, about("dimensions in which frames and units are compared; 0: plain softmax", ge=0)
    ] = 256
    logit_temperature: Annotated[float, about("divisor of the cosine similarity", gt=0)] = 0.1
    predict_layers: Annotated[tuple[int, ...], about("layers with a loss, of equal weight; empty: the last")] = ()
    penalty_weight: Annotated[float, about("weight of the mean square of the stem's output", ge=0)] = 10.0

    @property
    def frame_labels(self) -> FrameLabels | None:
        """The frame labels named by `labels`, if any."""
        if not self.labels:
            return None
        return FrameLabels(
            self.labels,
            self.label_rate_hz,
            self.units,
            name_field="labels",
            rate_field="label_rate_hz",
            classes_field="units",
        )

    @property
    def accepts_frame_labels(self) -> bool:
        """Always True; without `labels`, units are computed during the run."""
        return True

    def cautions(self, total_steps: int) -> list[str]:
        """Returns a warning about a relabelling after the end of the run, which has no effect."""
        if self.relabel_step < total_steps:
            return []
        return [f"objective.relabel_step={self.relabel_step} is never reached with train.steps={total_steps}"]


@dataclass
class UnitsPlan(MaskedPlan):
    labels_N: Tensor | None
    """Units of the masked frames, −1 without a label; None: computed in the forward pass."""


class FoundUnits(NamedTuple):
    """units_N: units of the masked frames.  inputs_ND: input of a fixed quantiser; None: the units are clusters."""

    units_N: Tensor
    inputs_ND: Tensor | None = None


class UnitClassifier(nn.Module):
    """Computes logits over units: cosine to learned embeddings / temperature (HuBERT, eq. 3), or a linear layer.

    Args:
        dim: channels of a frame.
        units: number of units.
        projection_dim: channels of the learned embeddings; 0: a linear layer.
        temperature: of the cosines.
    """

    def __init__(self, dim: int, units: int, projection_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(dim, projection_dim or units)
        self.embedding_KD = nn.Parameter(torch.rand(units, projection_dim)) if projection_dim else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Returns the fp32 (N, units) logits of (N, dim) frames."""
        x_ND = self.linear(x_ND).float()
        if self.embedding_KD is None:
            return x_ND
        with full_precision(x_ND.device):
            return F.normalize(x_ND, dim=1) @ F.normalize(self.embedding_KD.float(), dim=1).T / self.temperature


class MaskedUnits(Objective):
    """Cross-entropy over the units of masked frames (HuBERT, arXiv 2106.07447, eq. 1 with α = 1), summed over layers.

    Frames without a label have no target. The feature penalty is fairseq's mean square of the stem's output.
    """

    def __init__(self, config: MaskedUnitsConfig, shape: ModelShape) -> None:
        super().__init__()
        self.units_config = config
        self.shape = shape
        self.predict_layers = config.predict_layers or (shape.n_layers,)
        if max(*self.predict_layers, config.relabel_layer * bool(config.relabel_step)) > shape.n_layers:
            raise ValueError(
                f"objective.predict_layers={list(self.predict_layers)} or relabel_layer={config.relabel_layer} is "
                f"beyond the encoder's {shape.n_layers} layers"
            )
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim))
        later_units = config.relabel_units or config.units
        most_units = max(config.units, later_units if config.relabel_step else 0)
        self.classifiers = nn.ModuleList(
            UnitClassifier(shape.dim, most_units, config.projection_dim, config.logit_temperature)
            for _ in self.predict_layers
        )
        self.features: TorchaudioMfcc | LogMel = TorchaudioMfcc() if config.features == "mfcc" else LogMel()
        self.stacked = rate_ratio(self.features.rate_hz, shape.rate_hz) if config.features == "best_rq" else 1
        self.quantizer = (
            RandomProjectionQuantizer(self.features.dim * self.stacked, 16, config.units)
            if config.features == "best_rq" and not config.labels
            else None
        )
        self.teacher: Teacher | None = None
        if not config.labels and self.quantizer is None:
            self.register_buffer("centres_KD", torch.randn(config.units, self.features.dim))
        if not config.labels:
            self.first_fit = FittedOnce()
        if not config.labels and config.relabel_step:
            self.register_buffer("layer_centres_KD", torch.randn(later_units, shape.dim))
            self.layer_fit = FittedOnce()
        self.centres_KD: Tensor
        self.layer_centres_KD: Tensor

    def attach(self, model: SpeechModel) -> None:
        if self.units_config.relabel_step and not self.units_config.labels:
            self.teacher = Teacher(model)
            encoder = self.teacher.copy.encoder
            assert isinstance(encoder, type(model.encoder))
            encoder.stop_after = self.units_config.relabel_layer

    def least_samples(self, frontend: Frontend) -> int:
        window = 1 if self.units_config.labels else shortest_input(self.features.lengths)
        return max(super().least_samples(frontend), window)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> UnitsPlan:
        mask = draw_span_mask(model.frontend, batch, ctx, self.units_config.mask_prob, self.units_config.mask_span)
        name = self.units_config.labels
        if not name:
            return UnitsPlan(mask, mask.count, None)
        if name not in batch.targets:
            raise ConfigError(
                f"objective.labels={name!r}: the data has no such frame labels, only {sorted(batch.targets)}"
            )
        ratio = rate_ratio(self.units_config.label_rate_hz, self.shape.rate_hz)
        labels_BF = pad_labels(batch.targets[name][:, ::ratio], frame_width(model.frontend, batch))
        labels_N = labels_BF.flatten()[mask.flat_N]
        return UnitsPlan(mask, (labels_N >= 0).sum().double(), labels_N)

    def audio(self, batch: Batch, plan: MicroBatchPlan) -> Tensor:
        """Returns the student's input, (B, T)."""
        return batch.wave_BT

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, UnitsPlan)
        found = self.find_units(model, batch, plan.mask, ctx) if plan.labels_N is None else FoundUnits(plan.labels_N)
        labels_N = found.units_N
        features = model.extract(self.audio(batch, plan), batch.lengths_B)
        frames = model.project(features)
        x_BFD = torch.where(plan.mask.mask_BF[:, :, None], self.mask_embedding.to(frames.x_BFD.dtype), frames.x_BFD)
        encoded: EncoderOutput = model.encoder(Frames(x_BFD, frames.lengths_B, frames.rate_hz), ctx)

        units, prediction = self.active_units(), torch.zeros((), device=x_BFD.device)
        for layer, classify in zip(self.predict_layers, self.classifiers, strict=True):
            logits_NK = classify(encoded.layers[layer].flatten(0, 1)[plan.mask.flat_N])[:, :units]
            losses = F.cross_entropy(logits_NK, labels_N, ignore_index=-1, reduction="sum")
            prediction = prediction + losses / len(self.predict_layers)
        hits = (logits_NK.argmax(1) == labels_N).sum()
        count = plan.count.to(x_BFD.device)
        penalty = feature_penalty(features, plan.mask)
        metrics = {
            "loss/prediction": (prediction, count),
            "loss/feature_penalty": (penalty, count),
            "metric/accuracy": (hits, count),
            "metric/masked_share": (plan.mask.count.to(x_BFD.device), encoded.lengths_B.sum()),
            CODE_COUNTS: (histogram(labels_N, units), count),
        }
        self.record(
            lambda: MicroBatchRecord(plan.mask.mask_BF, labels_N, logits_NK.argmax(1), target_inputs_XD=found.inputs_ND)
        )
        return LossOutput(prediction + self.units_config.penalty_weight * penalty, count, metrics), encoded

    def monitoring(self) -> MonitoringRecord:
        return MonitoringRecord(
            "loss/prediction",
            "metric/accuracy",
            books=books_of(CODE_COUNTS, (self.active_units(),)),
            fixed_targets=bool(self.units_config.labels),
            target_version=int(self.relabelled),
            last=self._last,
        )

    def active_units(self) -> int:
        """Returns the current number of units."""
        config = self.units_config
        return config.relabel_units or config.units if self.relabelled else config.units

    @property
    def relabelled(self) -> bool:
        """Whether the current units come from a layer of the model."""
        return self.teacher is not None and self.layer_fit.fitted

    def forget(self) -> None:
        if not self.units_config.labels:
            self.first_fit.forget()
        if self.teacher is not None:
            self.layer_fit.forget()

    @torch.no_grad()
    def find_units(self, model: SpeechModel, batch: Batch, mask: FrameMask, ctx: StepContext) -> FoundUnits:
        """Computes the units of the masked frames from the clean audio; also collects frames for k-means when due.

        Args:
            model: front end and encoder.
            batch: one micro-batch, (B, T) audio.
            mask: the N masked frames.
            ctx: seed and step.

        Returns:
            (N,) units, and the (N, D) input of a fixed quantiser, if there is one.
        """
        if self.teacher is not None and ctx.step >= self.units_config.relabel_step and self.layer_fit.due:
            was_training = model.training
            clean = model.eval()(batch.wave_BT, batch.lengths_B)
            model.train(was_training)
            layer_BFD = clean.layers[self.units_config.relabel_layer]
            self.layer_fit.rows[batch.micro_batch] = layer_BFD[clean.final.valid_BF()].float()
        if self.relabelled:
            assert self.teacher is not None
            encoded: EncoderOutput = self.teacher.copy(batch.wave_BT, batch.lengths_B)
            return FoundUnits(nearest_codes(encoded.layers[-1].flatten(0, 1)[mask.flat_N], self.layer_centres_KD))
        features = stack_frames(self.features(batch.wave_BT, batch.lengths_B), self.stacked)
        if self.first_fit.due:
            self.first_fit.rows[batch.micro_batch] = features.x_BFD[features.valid_BF()]
        ratio = rate_ratio(features.rate_hz, self.shape.rate_hz)
        thinned_BFD = features.x_BFD[:, ::ratio]
        missing = mask.mask_BF.shape[1] - thinned_BFD.shape[1]
        thinned_BFD = F.pad(thinned_BFD, (0, 0, 0, max(missing, 0)))[:, : mask.mask_BF.shape[1]]
        masked_ND = thinned_BFD.flatten(0, 1)[mask.flat_N]
        if self.quantizer is None:
            return FoundUnits(nearest_codes(masked_ND, self.centres_KD))
        return FoundUnits(self.quantizer(masked_ND), masked_ND)

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Fits the units to the frames of this update, if it is the first or that of the relabelling."""
        if self.units_config.labels:
            return
        seed = keyed_seed(ctx.seed, ctx.step, "units")
        if (rows_ND := self.first_fit.take()) is not None:
            if self.quantizer is None:
                self.centres_KD.copy_(from_first_rank(kmeans(rows_ND, len(self.centres_KD), seed)))
            else:
                self.quantizer.whiten(rows_ND)
                from_first_rank(self.quantizer.projection_DC)
        if self.teacher is not None and (rows_ND := self.layer_fit.take()) is not None:
            self.layer_centres_KD.copy_(from_first_rank(kmeans(rows_ND, len(self.layer_centres_KD), seed)))
            self.teacher.follow(model, decay=0.0)


def pad_labels(labels_BF: Tensor, width: int) -> Tensor:
    """Returns (B, F) labels cut or padded with −1 to `width` frames."""
    return F.pad(labels_BF, (0, max(width - labels_BF.shape[1], 0)), value=-1)[:, :width]


def feature_penalty(features: Frames, mask: FrameMask) -> Tensor:
    """Returns the mean square of the features of each utterance, weighted by its masked frames and summed.

    0 for features without trained weights, such as log-mel.
    """
    if features.raw_BFD is None:
        return features.x_BFD.new_zeros((), dtype=torch.float32)
    raw_BFD = features.raw_BFD.float()
    sum_B = (raw_BFD.square().mean(2) * features.valid_BF()).sum(1)
    square_B = sum_B / features.lengths_B.to(raw_BFD.device, non_blocking=True).clamp(min=1)
    return (square_B * mask.counts_B).sum()
