"""DinoSR: predict the online clusters of an EMA teacher's layers at masked frames (arXiv 2305.10005, §3)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import CODE_COUNTS, CodeBook, MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.numerics import histogram
from pretrain.nn.spectral import normalize_frames
from pretrain.self_supervision.masking import FrameMask, MaskedPlan, draw_span_mask
from pretrain.self_supervision.quantizers import nearest_codes
from pretrain.self_supervision.teacher import Teacher, all_but_positions, annealed_decay, layer_teacher


@config
class Config(ObjectiveConfig):
    name: Literal["dinosr"] = "dinosr"
    mask_prob: Annotated[float, about("share of frames in masked spans, counted before overlaps", gt=0, le=1)] = 0.8
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 10
    top_layers: Annotated[int, about("number of last layers of the teacher with a codebook each", ge=1)] = 8
    n_codes: Annotated[int, about("codes of each codebook", ge=2)] = 256
    code_decay: Annotated[float, about("decay of the codes' running sums", ge=0, lt=1)] = 0.9
    ema_start: Annotated[float, about("EMA decay at the first update", ge=0, le=1)] = 0.999
    ema_end: Annotated[float, about("EMA decay after ema_steps updates", ge=0, le=1)] = 0.9999
    ema_steps: Annotated[int, about("updates over which the decay rises linearly", ge=1)] = 30_000
    freeze_step: Annotated[int, about("the teacher is frozen from this update on; 0: never", ge=0)] = 200_000


class DinoSR(Objective):
    """Predicts the codes of several teacher layers from the student's last layer (eq. 3–6).

    Each of these layers has a codebook and a classifier.
    """

    gathers = True

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        self.top_layers, self.n_layers = min(config.top_layers, shape.n_layers), shape.n_layers
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim))
        self.classifiers = nn.ModuleList(nn.Linear(shape.dim, config.n_codes) for _ in range(self.top_layers))
        # mean 0 and deviation 1 per channel over the codes, like the teacher's output over the frames
        codes = F.instance_norm(torch.randn(self.top_layers, shape.dim, config.n_codes)).transpose(1, 2).contiguous()
        self.register_buffer("sums_LVD", codes)
        self.register_buffer("sizes_LV", torch.ones(self.top_layers, config.n_codes))
        self.register_buffer("new_sums_LVD", torch.zeros_like(codes), persistent=False)
        self.register_buffer("new_sizes_LV", torch.zeros(self.top_layers, config.n_codes), persistent=False)
        self.sums_LVD: Tensor
        self.sizes_LV: Tensor
        self.new_sums_LVD: Tensor
        self.new_sizes_LV: Tensor
        self.teacher: Teacher | None = None

    def attach(self, model: SpeechModel) -> None:
        self.teacher = layer_teacher(model)

    def forget(self) -> None:
        self.new_sums_LVD.zero_()
        self.new_sizes_LV.zero_()

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MaskedPlan:
        mask = draw_span_mask(model.frontend, batch, ctx, self.config.mask_prob, self.config.mask_span)
        return MaskedPlan(mask, mask.count * self.top_layers)

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, MaskedPlan)
        frames = model.project(model.extract(batch.wave_BT, batch.lengths_B))
        labels_LN = self.labels(frames, plan.mask)
        x_BFD = torch.where(plan.mask.mask_BF[:, :, None], self.mask_embedding.to(frames.x_BFD.dtype), frames.x_BFD)
        encoded: EncoderOutput = model.encoder(Frames(x_BFD, frames.lengths_B, frames.rate_hz), ctx)
        masked_ND = encoded.final.x_BFD.flatten(0, 1)[plan.mask.flat_N]
        total = torch.zeros((), device=x_BFD.device)
        hits = torch.zeros_like(total)
        count = plan.count.to(x_BFD.device)
        metrics = {"metric/masked_share": (plan.mask.count.to(x_BFD.device), encoded.lengths_B.sum())}
        for layer, classify in enumerate(self.classifiers):
            logits_NV = classify(masked_ND).float()
            total = total + F.cross_entropy(logits_NV, labels_LN[layer], reduction="sum")
            hits = hits + (logits_NV.argmax(1) == labels_LN[layer]).sum()
            use_V = histogram(labels_LN[layer], self.config.n_codes)
            metrics[self.book_metric(layer)] = (use_V, use_V.sum())
        metrics["metric/accuracy"] = (hits, count)
        self.record(lambda: MicroBatchRecord(plan.mask.mask_BF, labels_LN[-1], logits_NV.argmax(1)))
        return LossOutput(total, count, metrics), encoded

    @torch.no_grad()
    def labels(self, frames: Frames, mask: FrameMask) -> Tensor:
        """Returns the nearest code of each teacher layer at the masked frames, (L, N).

        In training, also accumulates the sums of frames per code for `after_step`.
        """
        assert self.teacher is not None
        output: EncoderOutput = self.teacher.copy(Frames(frames.x_BFD.detach(), frames.lengths_B, frames.rate_hz))
        codes_LVD = self.sums_LVD / self.sizes_LV[:, :, None]
        labels = []
        for layer, x_BFD in enumerate(output.ffn_layers[-self.top_layers :]):
            x_ND = normalize_frames(x_BFD.float(), output.lengths_B).flatten(0, 1)[mask.flat_N]
            labels.append(nearest_codes(x_ND, codes_LVD[layer]))
            if self.training:
                self.new_sums_LVD[layer].index_add_(0, labels[-1], x_ND)
                self.new_sizes_LV[layer] += histogram(labels[-1], self.config.n_codes)
        return torch.stack(labels)

    def book_metric(self, layer: int) -> str:
        """Returns the metric with a teacher layer's code counts: `hist/codes` for the last, others with a suffix."""
        below_last = f"/layer_{self.n_layers - self.top_layers + layer + 1}"
        return CODE_COUNTS + (below_last if layer < self.top_layers - 1 else "")

    def monitoring(self) -> MonitoringRecord:
        n, size = self.top_layers, self.config.n_codes
        metrics = sorted(self.book_metric(layer) for layer in range(n))  # so that the last layer's is book 1
        titles = ["the targets"] if n == 1 else [f"the targets of code book {i} of {n}" for i in range(1, n + 1)]
        books = tuple(CodeBook(metric, 0, size, title) for metric, title in zip(metrics, titles, strict=True))
        return MonitoringRecord("loss/objective", "metric/accuracy", books=books, last=self._last)

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Updates the teacher and the codes that have frames in this update; other codes are unchanged (α = 1)."""
        assert self.teacher is not None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.new_sums_LVD)
            dist.all_reduce(self.new_sizes_LV)
        decay_LV = torch.where(self.new_sizes_LV > 0, self.config.code_decay, 1.0)
        self.sums_LVD.mul_(decay_LV[:, :, None]).add_(self.new_sums_LVD * (1 - decay_LV)[:, :, None])
        self.sizes_LV.mul_(decay_LV).add_(self.new_sizes_LV * (1 - decay_LV))
        if not self.config.freeze_step or ctx.step < self.config.freeze_step:
            decay = annealed_decay(ctx.step, self.config.ema_start, self.config.ema_end, self.config.ema_steps)
            self.teacher.follow(model.encoder, decay, all_but_positions)
        self.forget()


def build(config: Config, shape: ModelShape) -> DinoSR:
    return DinoSR(config, shape)
