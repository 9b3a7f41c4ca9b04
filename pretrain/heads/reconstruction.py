"""Reconstruction of the input's log-mel features from the encoder's frames, by L1 (TERA, arXiv 2007.06028)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError, about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext, valid_frames
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.nn.numerics import full_precision, pad_audio, rate_ratio, stack_frames
from pretrain.nn.spectral import LogMel, Normalize


@config
class Config(HeadConfig):
    name: Literal["reconstruction"] = "reconstruction"
    n_mels: Annotated[int, about("mel bands to reconstruct", ge=1, le=256)] = 80
    normalize: Annotated[Normalize, about("their statistics: of each utterance, or fixed ones")] = "utterance"
    frames: Annotated[
        Literal["all", "masked"], about("all frames, or those that the objective masks and no others")
    ] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames == "masked" and self.input == "whole":
            refuse("frames", self.frames, "a whole pass has no masked frames; set input=objective, or frames=all")


class Reconstruction(Head):
    """Predicts the log-mel frames that each encoder frame spans; targets are their values. It needs no label."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.mel = LogMel(config.n_mels, normalize=config.normalize)
        self.ratio = rate_ratio(self.mel.rate_hz, shape.rate_hz)
        self.linear = nn.Linear(shape.dim, config.n_mels * self.ratio)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        frames_B = self._frames(model.frontend.frame_lengths(batch.lengths_B), batch)
        return HeadPlan(frames_B.sum().double() * self.linear.out_features, frames_B > 0)

    def restrict(self, plan: HeadPlan, model: SpeechModel, batch: Batch, masked_BF: Tensor | None) -> HeadPlan:
        if self.config.frames == "all":
            return plan
        if masked_BF is None:
            raise ConfigError("frames=masked of the head reconstruction: the objective masks no frame; set frames=all")
        frames_B = self._frames(model.frontend.frame_lengths(batch.lengths_B), batch)
        counted_BF = masked_BF & valid_frames(frames_B, masked_BF.shape[1], masked_BF.device)
        return HeadPlan(counted_BF.sum().double() * self.linear.out_features, counted_BF.any(1).cpu(), counted_BF)

    def _frames(self, lengths_B: Tensor, batch: Batch) -> Tensor:
        """Returns the number of frames of each row that have a whole target, (B,)."""
        return torch.minimum(lengths_B, self.mel.lengths(batch.lengths_B) // self.ratio)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        predicted_BFV: Tensor = self.linear(self.frames(encoded).x_BFD)
        frames, device = predicted_BFV.shape[1], predicted_BFV.device
        wave_BT = pad_audio(batch.wave_BT, self.mel.window)
        targets_BFV = _to_frames(stack_frames(self.mel(wave_BT, batch.lengths_B), self.ratio).x_BFD, frames)
        if plan.counted_BF is None:
            counted_BF = valid_frames(self._frames(encoded.lengths_B, batch) * plan.rows_B, frames, device)
        else:
            counted_BF = _to_frames(plan.counted_BF.to(device)[:, :, None], frames)[:, :, 0]
        with full_precision(device):
            error_BF = (predicted_BFV.float() - targets_BFV).abs().sum(2)
        count = counted_BF.sum() * self.linear.out_features
        return LossOutput(error_BF.masked_fill(~counted_BF, 0.0).sum(), count)


def _to_frames(x_BFD: Tensor, frames: int) -> Tensor:
    """Returns (B, F, D) padded with zeros or cut to `frames` frames."""
    return F.pad(x_BFD, (0, 0, 0, max(frames - x_BFD.shape[1], 0)))[:, :frames]


def build(config: Config, shape: ModelShape) -> Reconstruction:
    return Reconstruction(config, shape)
