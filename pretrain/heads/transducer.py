"""RNN transducer (Graves, arXiv 1211.3711) with a stateless predictor over the last two tokens (Ghodsi et al. 2020).

The loss is computed by the forward recursion in the log semiring, one frame after the other, because
torchaudio wheels without the C++ extension have no transducer loss.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.inference.streaming_transducer import TransducerDecoder
from pretrain.interfaces.configs import TextHeadConfig
from pretrain.interfaces.decoding import EndPoints
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import HeadPlan, LossOutput, TextHead
from pretrain.nn.numerics import full_precision
from pretrain.nn.text_targets import BLANK, foreign_symbols, text_targets

CONTEXT = 2
"""Tokens that the predictor reads; the blank takes the place of those before the first one."""


@config
class Config(TextHeadConfig):
    name: Literal["transducer"] = "transducer"
    joint_dim: Annotated[int, about("channels in which frames and tokens are joined", ge=1)] = 256
    max_tokens: Annotated[
        int,
        about(
            "segments with more tokens are left out: memory grows with frames · tokens · classes of the longest", ge=1
        ),
    ] = 400


class Transducer(TextHead):
    """−ln of the summed probability of all ways to emit the text along the frames; count: tokens of the texts.

    Classes are the blank, 0, then the tokens. A segment without text, without a frame or with more than `max_tokens`
    tokens does not count.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.frame = nn.Linear(shape.dim, config.joint_dim)
        self.embedding = nn.Embedding(config.n_classes, config.joint_dim)
        self.predictor = nn.Linear(CONTEXT * config.joint_dim, config.joint_dim)
        self.output = nn.Linear(config.joint_dim, config.n_classes)

    @property
    def context(self) -> int:
        """Tokens that the predictor reads."""
        return CONTEXT

    def decoder_frames(self, encoded: EncoderOutput) -> Tensor:
        """Returns the frames as `join` reads them, (B, F, J)."""
        frame_BFJ: Tensor = self.frame(self.frames(encoded).x_BFD)
        return frame_BFJ

    def streaming_decoder(self, rate_hz: float, beam: int, end_points: EndPoints) -> TransducerDecoder:
        spaces = frozenset(number for number, symbol in enumerate(self.symbols) if symbol == " ")
        return TransducerDecoder(rate_hz, self, self.output.weight.device, spaces, beam, end_points)

    def predict(self, classes_NC: Tensor) -> Tensor:
        """Returns what `join` reads of the last tokens' classes, (…, C) to (…, J)."""
        token_NJ: Tensor = self.predictor(self.embedding(classes_NC).flatten(-2).tanh())
        return token_NJ

    def join(self, frame_NJ: Tensor, token_NJ: Tensor) -> Tensor:
        """Returns the logits of the next class, (…, V), of frames and last tokens, (…, J) each."""
        logits_NV: Tensor = self.output(torch.tanh(frame_NJ + token_NJ))
        return logits_NV

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        frames = model.frontend.frame_lengths(batch.lengths_B).tolist()
        targets = text_targets(self.config, batch)
        most = self.config.max_tokens
        sizes = [
            len(target) if limit and len(target) <= most else 0 for target, limit in zip(targets, frames, strict=True)
        ]
        return HeadPlan(torch.tensor(float(sum(sizes)), dtype=torch.float64), torch.tensor(sizes) > 0)

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        frame_BFJ = self.decoder_frames(encoded)
        device, targets = frame_BFJ.device, text_targets(self.config, batch)
        kept = [target if fits else [] for target, fits in zip(targets, plan.rows_B.tolist(), strict=True)]
        lengths_B = torch.tensor([len(target) for target in kept], device=device)
        longest = max((len(target) for target in kept), default=0)
        ids_BN = torch.tensor([target + [BLANK] * (longest - len(target)) for target in kept], device=device)
        ids_BN = ids_BN.reshape(len(kept), longest).long()
        token_BNJ = self.predict(F.pad(ids_BN, (CONTEXT, 0), value=BLANK).unfold(1, CONTEXT, 1))
        # (B, F, N + 1, V) is the memory of this loss; blank and the next token are all that is kept
        logits_BFNV = self.join(frame_BFJ[:, :, None], token_BNJ[:, None])
        with full_precision(device):
            logits_BFNV = logits_BFNV.to(torch.promote_types(logits_BFNV.dtype, torch.float32))
            total_BFN = logits_BFNV.logsumexp(-1)
            blank_BFN = logits_BFNV[..., BLANK] - total_BFN
            index_BFN1 = ids_BN[:, None, :, None].expand(-1, logits_BFNV.shape[1], -1, -1)
            token_BFN = logits_BFNV[:, :, :longest].gather(-1, index_BFN1)[..., 0] - total_BFN[:, :, :longest]
            losses_B = transducer_loss(blank_BFN, token_BFN, encoded.lengths_B, lengths_B)
        total = losses_B.masked_fill(lengths_B == 0, 0.0).sum()
        labelled = sum(map(bool, targets))
        one = functools.partial(torch.tensor, dtype=torch.float64, device=device)
        metrics = {INFEASIBLE: (one(labelled - int(plan.rows_B.sum())), one(labelled))}
        if not self.config.tokens:
            foreign, symbols = foreign_symbols(self.config, batch)
            metrics["foreign_symbols"] = (one(foreign), one(symbols))
        return LossOutput(total, lengths_B.sum(), metrics)


def transducer_loss(blank_BFN: Tensor, token_BFN: Tensor, frames_B: Tensor, tokens_B: Tensor) -> Tensor:
    """Returns −ln p of each row's tokens, (B,) (Graves 2012, eq. 16 to 18); 0 for rows without a frame.

    Args:
        blank_BFN: (B, F, N + 1) ln p(blank) at each frame after n tokens.
        token_BFN: (B, F, N) ln p of token n + 1 at each frame after n tokens.
        frames_B: valid frames.
        tokens_B: tokens of each text.

    Along one frame α_n = logaddexp(α'_n, α_{n−1} + token_{n−1}), where α' comes from the frame before. With the
    cumulative sum c of the tokens' ln p this is c + logcumsumexp(α' − c): one operation for all n.
    """
    B, n_frames, _ = blank_BFN.shape
    frames_B, tokens_B = frames_B.to(blank_BFN.device), tokens_B.to(blank_BFN.device)
    sum_BFN = F.pad(token_BFN.cumsum(2), (1, 0))
    ends_B1 = tokens_B[:, None]
    last_B = blank_BFN.new_zeros(B)
    alpha_BN = sum_BFN[:, 0]
    for frame in range(n_frames):
        if frame:
            before_BN = alpha_BN + blank_BFN[:, frame - 1]
            alpha_BN = sum_BFN[:, frame] + torch.logcumsumexp(before_BN - sum_BFN[:, frame], dim=1)
        final_B = (alpha_BN + blank_BFN[:, frame]).gather(1, ends_B1)[:, 0]
        last_B = torch.where(frames_B == frame + 1, final_B, last_B)
    return -last_B


def build(config: Config, shape: ModelShape) -> Transducer:
    return Transducer(config, shape)
