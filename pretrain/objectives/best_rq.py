"""BEST-RQ: predict the random-projection codes of masked frames (arXiv 2202.01855, §3; SpeechBrain's recipe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import Frontend, ModelShape, SpeechModel, shortest_input
from pretrain.interfaces.monitoring import CODE_COUNTS, MicroBatchRecord, MonitoringRecord, books_of
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.numerics import full_precision, histogram, rate_ratio, stack_frames
from pretrain.nn.spectral import LogMel
from pretrain.self_supervision.deferred_fit import FittedOnce
from pretrain.self_supervision.kmeans import from_first_rank, kmeans
from pretrain.self_supervision.masking import FrameMask, MaskedPlan, block_mask, draw_frame_mask
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer


@config
class Config(ObjectiveConfig):
    name: Literal["best_rq"] = "best_rq"
    n_codes: Annotated[int, about("codes of the codebook", ge=2)] = 8192
    code_dim: Annotated[int, about("dimensions of a code", ge=1)] = 16
    projection: Annotated[
        Literal["random", "pca"], about("random, or the whitened principal axes of the first update's frames")
    ] = "random"
    refine: Annotated[bool, about("move the codes by k-means on the first update's frames")] = False
    codebooks: Annotated[int, about("independent random codebooks, each with its own classifier", ge=1)] = 1
    mask_share: Annotated[float, about("share of the frames that is masked", gt=0, le=1)] = 0.6
    mask_block: Annotated[int, about("encoder frames per masked block", ge=1)] = 4
    noise_std: Annotated[float, about("deviation of the noise that replaces masked features", ge=0)] = 0.1
    target_mels: Annotated[int, about("mel bands of the features that the targets come from", ge=1)] = 80


@dataclass
class NoisePlan(MaskedPlan):
    noise_BFD: Tensor
    """Noise that replaces masked feature frames, (B, feature frames, feature_dim)."""


class BestRQ(Objective):
    """Replaces the features of masked frames by noise; a linear layer predicts the codes of the original features.

    Targets (§3.1): argmin over codes c of ‖norm(c) − norm(A x)‖ for x, the stacked log-mel of a frame, and a random
    projection A. Loss (§3.2): cross-entropy per masked frame and codebook.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        self.ratio = rate_ratio(shape.feature_rate_hz, shape.rate_hz)
        self.feature_dim = shape.feature_dim
        self.mel = LogMel(config.target_mels)
        self.mels_per_frame = rate_ratio(self.mel.rate_hz, shape.rate_hz)
        self.quantizers = nn.ModuleList(
            RandomProjectionQuantizer(config.target_mels * self.mels_per_frame, config.code_dim, config.n_codes)
            for _ in range(config.codebooks)
        )
        self.fit = FittedOnce() if config.refine or config.projection == "pca" else None
        """Masked frames of the first update, to which the quantisers are fitted; None if they stay random."""
        self.classifiers = nn.ModuleList(nn.Linear(shape.dim, config.n_codes) for _ in range(config.codebooks))

    def least_samples(self, frontend: Frontend) -> int:
        return max(super().least_samples(frontend), shortest_input(self.mel.lengths))

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> NoisePlan:
        def draw(length: int, rng: np.random.Generator) -> np.ndarray:
            return block_mask(length, self.config.mask_share, self.config.mask_block, rng)

        mask = draw_frame_mask(model.frontend, batch, ctx, draw)
        lengths = model.frontend.feature_lengths(batch.lengths_B).tolist()
        width = int(model.frontend.feature_lengths(torch.tensor([batch.wave_BT.shape[1]])))
        noise_BFD = np.zeros((len(lengths), width, self.feature_dim), dtype=np.float32)
        for row, (length, key) in enumerate(zip(lengths, batch.keys, strict=True)):
            rng = keyed_rng(ctx.seed, ctx.step, key, "noise")
            noise_BFD[row, :length] = rng.standard_normal((length, self.feature_dim), dtype=np.float32)
        noise = torch.from_numpy(noise_BFD).to(batch.wave_BT.device, non_blocking=True)
        return NoisePlan(mask, mask.count * self.config.codebooks, noise * self.config.noise_std)

    def forget(self) -> None:
        if self.fit is not None:
            self.fit.forget()

    @torch.no_grad()
    def target_features(self, batch: Batch, mask: FrameMask) -> Tensor:
        """Returns the stacked log-mel of the masked frames, (N, target_mels · windows per frame)."""
        mel = self.mel(batch.wave_BT, batch.lengths_B)
        stacked_BFD = stack_frames(mel, self.mels_per_frame).x_BFD
        # a front end with shorter windows may have an additional frame at the end
        missing = mask.mask_BF.shape[1] - stacked_BFD.shape[1]
        stacked_BFD = F.pad(stacked_BFD, (0, 0, 0, max(missing, 0)))[:, : mask.mask_BF.shape[1]]
        masked_ND = stacked_BFD.flatten(0, 1)[mask.flat_N]
        if self.fit is not None and self.fit.due:
            self.fit.rows[batch.micro_batch] = masked_ND
        return masked_ND

    def masked_features(self, features: Frames, plan: NoisePlan) -> Frames:
        """Returns (B, F', feature_dim) features in which the frames of masked encoder frames are noise."""
        masked_BF = plan.mask.mask_BF.repeat_interleave(self.ratio, dim=1)
        masked_BF = F.pad(masked_BF, (0, features.x_BFD.shape[1] - masked_BF.shape[1]))
        x_BFD = torch.where(masked_BF[:, :, None], plan.noise_BFD.to(features.x_BFD.dtype), features.x_BFD)
        return Frames(x_BFD, features.lengths_B, features.rate_hz)

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, NoisePlan)
        features = model.extract(batch.wave_BT, batch.lengths_B)
        encoded: EncoderOutput = model.encoder(model.project(self.masked_features(features, plan)), ctx)
        masked_ND = encoded.final.x_BFD.flatten(0, 1)[plan.mask.flat_N]
        total = masked_ND.new_zeros((), dtype=torch.float32)
        hits = torch.zeros_like(total)
        code_counts = []
        inputs_ND = self.target_features(batch, plan.mask)
        for classify, quantizer in zip(self.classifiers, self.quantizers, strict=True):
            logits_NC, labels_N = classify(masked_ND), quantizer(inputs_ND)
            with full_precision(total.device):
                total = total + F.cross_entropy(logits_NC.float(), labels_N, reduction="sum")
            hits = hits + (logits_NC.argmax(-1) == labels_N).sum()
            code_counts.append(histogram(labels_N, self.config.n_codes))
        count = plan.count.to(total.device)
        metrics = {
            "metric/accuracy": (hits, count),
            "metric/masked_share": (plan.mask.count.to(total.device), encoded.lengths_B.sum()),
            CODE_COUNTS: (torch.cat(code_counts), count),
        }
        self.record(
            lambda: MicroBatchRecord(
                plan.mask.mask_BF,
                target_units_N=labels_N,
                predicted_units_N=logits_NC.argmax(-1),
                targets_ND=None,
                predictions_ND=None,
                target_inputs_XD=inputs_ND,
            )
        )
        return LossOutput(total, count, metrics), encoded

    def monitoring(self) -> MonitoringRecord:
        books = books_of(CODE_COUNTS, (self.config.n_codes,) * self.config.codebooks)
        return MonitoringRecord("loss/objective", "metric/accuracy", books=books, fixed_targets=True, last=self._last)

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Fits principal axes and codes to the masked frames of the first update."""
        rows_ND = self.fit.take() if self.fit is not None else None
        if rows_ND is None:
            return
        for book, quantizer in enumerate(self.quantizers):
            assert isinstance(quantizer, RandomProjectionQuantizer)
            if self.config.projection == "pca":
                quantizer.whiten(rows_ND)
                from_first_rank(quantizer.projection_DC)
            if self.config.refine:
                seed = keyed_seed(ctx.seed, book, "refine")
                centres_KC = kmeans(quantizer.project(rows_ND), self.config.n_codes, seed)
                quantizer.codebook_KC.copy_(from_first_rank(F.normalize(centres_KC, dim=1)))


def build(config: Config, shape: ModelShape) -> BestRQ:
    return BestRQ(config, shape)
