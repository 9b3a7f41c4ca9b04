"""CTC on each segment's text label, in addition to the self-supervised loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.nn.numerics import full_precision

BLANK = 0


@config
class Config(HeadConfig):
    name: Literal["ctc"] = "ctc"
    label: Annotated[str, about("which label of a segment holds its text", min_length=1)] = "text"
    symbols: Annotated[str, about("characters to write; others are left out", min_length=1)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    tokens: Annotated[str, about("name in data.tokens of the tokens to write; empty: the characters in symbols")] = ""
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tokens) != bool(self.vocabulary):
            refuse(
                "vocabulary", self.vocabulary, "the number of tokens goes with their name: set tokens and vocabulary"
            )

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The text, unless the data have its tokens."""
        return () if self.tokens else (self.label,)

    @property
    def needed_tokens(self) -> tuple[str, ...]:
        """`tokens`."""
        return (self.tokens,) if self.tokens else ()

    @property
    def vocabulary_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary


class CTC(Head):
    """Connectionist temporal classification of characters (Graves et al. 2006); segments without text do not count.

    A segment with fewer frames than its text has characters, and blanks between equal ones, does not count either.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.label, self.tokens = config.label, config.tokens
        self.symbols = () if config.tokens else tuple(config.symbols)
        """What each symbol writes; symbol i is class i + 1. Empty where the run's tokens are written."""
        self.ids = {symbol: i + 1 for i, symbol in enumerate(self.symbols)}
        self.linear = nn.Linear(shape.dim, (config.vocabulary or len(self.ids)) + 1)

    def name_tokens(self, symbols: tuple[str, ...]) -> None:
        """Sets what the tokens of the run write, in the order of their ids."""
        self.symbols = symbols

    def targets(self, batch: Batch) -> list[list[int]]:
        """Returns the classes of each segment's text; empty without text."""
        if self.tokens:
            rows = batch.tokens[self.tokens].tolist() if self.tokens in batch.tokens else [[] for _ in batch.keys]
            return [[number + 1 for number in row if number >= 0] for row in rows]
        return [[self.ids[symbol] for symbol in text.lower() if symbol in self.ids] for text in self._texts(batch)]

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        targets = self.targets(batch)
        frames = model.frontend.frame_lengths(batch.lengths_B).tolist()
        usable = [0 < frames_needed(target) <= limit for target, limit in zip(targets, frames, strict=True)]
        count = sum(len(target) for target, fits in zip(targets, usable, strict=True) if fits)
        return HeadPlan(torch.tensor(float(count), dtype=torch.float64), torch.tensor(usable))

    def log_probs(self, encoded: EncoderOutput) -> Tensor:
        """Returns ln p of blank and symbols, (B, F, V), at least fp32, for decoding."""
        logits_BFV: Tensor = self.linear(self.frames(encoded).x_BFD)
        return logits_BFV.to(torch.promote_types(logits_BFV.dtype, torch.float32)).log_softmax(-1)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        log_probs_BFV = self.log_probs(encoded)
        device = log_probs_BFV.device
        targets, usable = self.targets(batch), plan.rows_B.tolist()
        kept = [target if fits else [] for target, fits in zip(targets, usable, strict=True)]
        lengths_B = torch.tensor([len(target) for target in kept], device=device)
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
        total = losses_B.masked_fill(lengths_B == 0, 0.0).sum()
        labelled = sum(map(bool, targets))
        one = functools.partial(torch.tensor, dtype=torch.float64, device=device)
        metrics = {"infeasible": (one(labelled - sum(usable)), one(labelled))}
        if not self.tokens:
            known, texts = self.ids, self._texts(batch)
            symbols = sum(sum(not symbol.isspace() or symbol in known for symbol in text) for text in texts)
            metrics["foreign_symbols"] = (one(symbols - sum(map(len, targets))), one(symbols))
        return LossOutput(total, lengths_B.sum(), metrics)

    def _texts(self, batch: Batch) -> tuple[str, ...]:
        return batch.labels.get(self.label, ("",) * len(batch.keys))


def frames_needed(target: Sequence[int]) -> int:
    """Returns the fewest frames on which CTC can spell `target`: one per symbol, and a blank between equal ones."""
    return len(target) + sum(one == other for one, other in itertools.pairwise(target))


def build(config: Config, shape: ModelShape) -> CTC:
    return CTC(config, shape)
