"""data2vec 2.0: one teacher pass, several masks; the student encodes visible frames only (arXiv 2212.07525, §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.numerics import masked_deviation, zero_padding
from pretrain.self_supervision.masking import adjusted_block_mask, frame_width
from pretrain.self_supervision.teacher import Teacher, annealed_decay, averaged_layers, layer_teacher


@config
class Config(ObjectiveConfig):
    name: Literal["data2vec2"] = "data2vec2"
    masks: Annotated[int, about("masked copies of each utterance per teacher pass", ge=1)] = 8
    mask_prob: Annotated[float, about("share of the frames that is masked", gt=0, lt=1)] = 0.5
    mask_adjust: Annotated[float, about("added to the share that blocks cover, against overlaps", ge=0, lt=1)] = 0.05
    mask_block: Annotated[int, about("frames per block", ge=1)] = 5
    mask_inverse: Annotated[bool, about("blocks of kept frames instead of blocks of masked ones")] = False
    mask_noise: Annotated[float, about("deviation of the noise that replaces masked frames in the decoder", ge=0)] = (
        0.01
    )
    top_layers: Annotated[int, about("number of last layers of the teacher that are averaged", ge=1)] = 8
    decoder_dropout: Annotated[float, about("dropout on the decoder's input", ge=0, lt=1)] = 0.1
    decoder_dim: Annotated[int, about("channels of the decoder; 16 or fewer groups must divide them", ge=1)] = 384
    decoder_layers: Annotated[int, about("convolutions of the decoder", ge=1)] = 4
    decoder_kernel: Annotated[int, about("kernel size of these convolutions; odd", ge=1)] = 7
    ema_start: Annotated[float, about("EMA decay at the first update", ge=0, le=1)] = 0.999
    ema_end: Annotated[float, about("EMA decay after ema_steps updates", ge=0, le=1)] = 0.99999
    ema_steps: Annotated[int, about("updates over which the decay rises linearly", ge=1)] = 75_000

    @property
    def gives_all_layers(self) -> bool:
        """Always False: the encoder computes visible frames only, and only its last layer is put back in place."""
        return False

    @property
    def gives_own_output(self) -> bool:
        """Always False: heads get the first copy, with its visible frames put back in place."""
        return False


@dataclass
class CopiesPlan(MicroBatchPlan):
    """Masks of R = B · masks rows; the copies of an utterance are adjacent."""

    mask_RF: Tensor
    kept_RK: Tensor
    """Indices of the visible frames of each row, in order; padding repeats the last."""
    kept_lengths_R: Tensor
    noise_RFD: Tensor
    count: Tensor


class ConvDecoder(nn.Module):
    """Decoder of §3.1: convolutions over all frames, each with a layer norm without weights and GELU.

    Residual connections from the second convolution on. Input and output are (B, F, dim).
    """

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        width, kernel = config.decoder_dim, config.decoder_kernel
        if kernel % 2 == 0:
            raise ValueError(f"objective.decoder_kernel={kernel} must be odd")
        groups = math.gcd(16, math.gcd(dim, width))
        self.convs = nn.ModuleList(
            TimeConv(width if layer else dim, width, kernel, padding=kernel // 2, groups=groups)
            for layer in range(config.decoder_layers)
        )
        self.linear = nn.Linear(width, dim)

    def forward(self, x_BFD: Tensor, lengths_B: Tensor) -> Tensor:
        for layer, conv in enumerate(self.convs):
            y_BFD = conv(zero_padding(x_BFD, lengths_B))
            y_BFD = F.gelu(F.layer_norm(y_BFD, y_BFD.shape[-1:]))
            x_BFD = x_BFD + y_BFD if layer else y_BFD
        out: Tensor = self.linear(x_BFD)
        return out


class Data2Vec2(Objective):
    """Regresses data2vec's targets with a decoder over the student's visible frames, for several masks per utterance.

    Loss: squared error / √D between decoder output and target, summed over channels, per masked frame of each copy.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config, self.dim = config, shape.dim
        self.top_layers = min(config.top_layers, shape.n_layers)
        self.decoder_dropout = Dropout(config.decoder_dropout)
        self.decoder = ConvDecoder(shape.dim, config)
        self.teacher: Teacher | None = None

    def attach(self, model: SpeechModel) -> None:
        self.teacher = layer_teacher(model)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> CopiesPlan:
        config, width = self.config, frame_width(model.frontend, batch)
        lengths = model.frontend.frame_lengths(batch.lengths_B).tolist()
        rows = len(lengths) * config.masks
        mask_RF = np.zeros((rows, width), dtype=bool)
        noise_RFD = np.zeros((rows, width, self.dim), dtype=np.float32)
        kept = []
        for row in range(rows):
            length, key = lengths[row // config.masks], batch.keys[row // config.masks]
            rng = keyed_rng(ctx.seed, ctx.step, key, "mask", row % config.masks)
            mask = adjusted_block_mask(
                length,
                config.mask_prob,
                adjust=config.mask_adjust,
                block=config.mask_block,
                rng=rng,
                inverse=config.mask_inverse,
            )
            mask_RF[row, :length] = mask
            noise_RFD[row, :length] = rng.standard_normal((length, self.dim), dtype=np.float32)
            kept.append(np.flatnonzero(~mask))
        most = max(1, *map(len, kept))
        kept_RK = np.zeros((rows, most), dtype=np.int64)
        for row, found in enumerate(kept):
            kept_RK[row] = np.pad(found, (0, most - len(found)), mode="edge") if len(found) else 0
        device = batch.wave_BT.device
        return CopiesPlan(
            mask_RF=torch.from_numpy(mask_RF).to(device),
            kept_RK=torch.from_numpy(kept_RK).to(device),
            kept_lengths_R=torch.tensor([len(found) for found in kept]),
            noise_RFD=torch.from_numpy(noise_RFD * config.mask_noise).to(device),
            count=torch.tensor(float(mask_RF.sum()), dtype=torch.float64),
        )

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """Computes the loss of one micro-batch, see `Objective.forward`.

        Returns:
            The loss over all copies, and the encoder's output of the first copy, (B, F, D), zero at its masked frames.
        """
        assert isinstance(plan, CopiesPlan)
        assert self.teacher is not None
        frames = model.project(model.extract(batch.wave_BT, batch.lengths_B))
        with torch.no_grad():
            seen = self.teacher.copy(Frames(frames.x_BFD.detach(), frames.lengths_B, frames.rate_hz))
        targets_BFD = averaged_layers(seen, self.top_layers)

        copies_RFD = frames.x_BFD.repeat_interleave(self.config.masks, dim=0)
        index_RKD = plan.kept_RK[:, :, None].expand(-1, -1, self.dim)
        kept = Frames(copies_RFD.gather(1, index_RKD), plan.kept_lengths_R, frames.rate_hz, places_BF=plan.kept_RK)
        encoded: EncoderOutput = model.encoder(kept, ctx)
        final_RKD = zero_padding(encoded.final.x_BFD, plan.kept_lengths_R)
        width, masks = copies_RFD.shape[1], self.config.masks
        grid_RFD = on_grid(self.decoder_dropout(final_RKD), index_RKD, width)
        filled_RFD = torch.where(plan.mask_RF[:, :, None], plan.noise_RFD.to(grid_RFD.dtype), grid_RFD)
        predictions_RFD = self.decoder(filled_RFD, frames.lengths_B.repeat_interleave(masks)).float()

        error_RF = (predictions_RFD - targets_BFD.repeat_interleave(masks, dim=0)).square().sum(2)
        total = error_RF.masked_fill(~plan.mask_RF, 0.0).sum() / math.sqrt(self.dim)
        count, n_frames = plan.count.to(total.device), frames.lengths_B.sum()
        metrics = {
            "metric/masked_share": (count, n_frames * masks),
            "health/target_std": (masked_deviation(targets_BFD, frames.valid_BF()) * n_frames, n_frames),
            "health/prediction_std": (masked_deviation(predictions_RFD, plan.mask_RF) * n_frames, n_frames),
        }
        first_BFD = on_grid(final_RKD[::masks], index_RKD[::masks], width)
        mask_BF = plan.mask_RF[::masks]
        self.record(
            lambda: MicroBatchRecord(mask_BF, None, None, targets_BFD[mask_BF], predictions_RFD[::masks][mask_BF])
        )
        return LossOutput(total, count, metrics), EncoderOutput((first_BFD,), frames.lengths_B, frames.rate_hz)

    def monitoring(self) -> MonitoringRecord:
        return MonitoringRecord.of_regression(self._last)

    @torch.no_grad()
    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        assert self.teacher is not None
        decay = annealed_decay(ctx.step, self.config.ema_start, self.config.ema_end, self.config.ema_steps)
        self.teacher.follow(model.encoder, decay)


def on_grid(x_RKD: Tensor, index_RKD: Tensor, width: int) -> Tensor:
    """Scatters visible frames to their times.

    Args:
        x_RKD: (R, K, D) visible frames.
        index_RKD: int64 time of each, repeated over D.
        width: number of frames F of the result.

    Returns:
        (R, width, D), zero at the other frames.
    """
    return x_RKD.new_zeros(len(x_RKD), width, x_RKD.shape[2]).scatter_add(1, index_RKD, x_RKD)


def build(config: Config, shape: ModelShape) -> Data2Vec2:
    return Data2Vec2(config, shape)
