"""CTC on each segment's text label, in addition to the self-supervised loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import config
from data_pipeline.core.types import Batch
from pretrain.inference.ctc_decoding import BeamSearch
from pretrain.inference.streaming_ctc import CTCDecoder, silent_frames
from pretrain.interfaces.configs import TextHeadConfig
from pretrain.interfaces.decoding import EndPoints
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import HeadPlan, LossOutput, TextHead
from pretrain.nn.numerics import full_precision
from pretrain.nn.text_targets import BLANK, foreign_symbols, text_targets


@config
class Config(TextHeadConfig):
    name: Literal["ctc"] = "ctc"


class CTC(TextHead):
    """Connectionist temporal classification of characters (Graves et al. 2006); segments without text do not count.

    A segment with fewer frames than its text has characters, and blanks between equal ones, does not count either.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.linear = nn.Linear(shape.dim, config.n_classes)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        targets = text_targets(self.config, batch)
        frames = model.frontend.frame_lengths(batch.lengths_B).tolist()
        usable = [0 < frames_needed(target) <= limit for target, limit in zip(targets, frames, strict=True)]
        count = sum(len(target) for target, fits in zip(targets, usable, strict=True) if fits)
        return HeadPlan(torch.tensor(float(count), dtype=torch.float64), torch.tensor(usable))

    def log_probs(self, encoded: EncoderOutput) -> Tensor:
        """Returns ln p of blank and symbols, (B, F, V), at least fp32, for decoding."""
        logits_BFV: Tensor = self.linear(self.frames(encoded).x_BFD)
        return logits_BFV.to(torch.promote_types(logits_BFV.dtype, torch.float32)).log_softmax(-1)

    def decoder_frames(self, encoded: EncoderOutput) -> Tensor:
        """Returns ln p of blank and symbols, (B, F, V)."""
        return self.log_probs(encoded)

    @property
    def gives_log_probs(self) -> bool:
        return True

    def streaming_decoder(self, rate_hz: float, beam: int, end_points: EndPoints) -> CTCDecoder:
        silent = functools.partial(silent_frames, self.symbols)
        return CTCDecoder(rate_hz, silent, BeamSearch(beam) if beam else None, end_points)

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        log_probs_BFV = self.log_probs(encoded)
        device = log_probs_BFV.device
        targets, usable = text_targets(self.config, batch), plan.rows_B.tolist()
        kept = [target if fits else [] for target, fits in zip(targets, usable, strict=True)]
        lengths_B = torch.tensor([len(target) for target in kept])
        flat_L = torch.tensor([symbol for target in kept for symbol in target], device=device, dtype=torch.int64)
        with full_precision(device):
            losses_B = F.ctc_loss(
                log_probs_BFV.transpose(0, 1),
                flat_L,
                encoded.lengths_B,
                lengths_B,
                blank=BLANK,
                reduction="none",
                zero_infinity=True,
            )
        total = losses_B.masked_fill((lengths_B == 0).to(device), 0.0).sum()
        labelled = sum(map(bool, targets))
        one = functools.partial(torch.tensor, dtype=torch.float64, device=device)
        metrics = {INFEASIBLE: (one(labelled - sum(usable)), one(labelled))}
        if not self.tokens:
            foreign, symbols = foreign_symbols(self.config, batch)
            metrics["foreign_symbols"] = (one(foreign), one(symbols))
        return LossOutput(total, lengths_B.sum(), metrics)


def frames_needed(target: Sequence[int]) -> int:
    """Returns the fewest frames on which CTC can spell `target`: one per symbol, and a blank between equal ones."""
    return len(target) + sum(one == other for one, other in itertools.pairwise(target))


def build(config: Config, shape: ModelShape) -> CTC:
    return CTC(config, shape)
