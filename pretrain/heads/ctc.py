"""CTC on each segment's text label, in addition to the self-supervised loss."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import ModelShape
from pretrain.interfaces.objectives import Head, LossOutput
from pretrain.nn.numerics import full_precision

BLANK = 0


@config
class Config(HeadConfig):
    name: Literal["ctc"] = "ctc"
    label: Annotated[str, about("which label of a segment holds its text", min_length=1)] = "text"
    symbols: Annotated[str, about("characters to write; others are left out", min_length=1)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The text."""
        return (self.label,)


class CTC(Head):
    """Connectionist temporal classification of characters; segments without text do not count."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.weight, self.label = config.weight, config.label
        self.symbols = tuple(config.symbols)
        """What each symbol writes; symbol i is class i + 1."""
        self.ids = {symbol: i + 1 for i, symbol in enumerate(config.symbols)}
        self.linear = nn.Linear(shape.dim, len(self.ids) + 1)

    def targets(self, batch: Batch) -> list[list[int]]:
        """Returns the symbol ids of each segment; empty without text."""
        texts = batch.labels.get(self.label, ("",) * len(batch.keys))
        return [[self.ids[symbol] for symbol in text.lower() if symbol in self.ids] for text in texts]

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(float(sum(map(len, self.targets(batch)))), dtype=torch.float64)

    def log_probs(self, encoded: EncoderOutput) -> Tensor:
        """Returns ln p of blank and symbols, (B, F, V), at least fp32, for decoding."""
        logits_BFV: Tensor = self.linear(encoded.final.x_BFD)
        return logits_BFV.to(torch.promote_types(logits_BFV.dtype, torch.float32)).log_softmax(-1)

    def forward(self, encoded: EncoderOutput, batch: Batch) -> LossOutput:
        targets = self.targets(batch)
        logits_BFV = self.linear(encoded.final.x_BFD)
        device = logits_BFV.device
        lengths_B = torch.tensor([len(target) for target in targets], device=device)
        flat_L = torch.tensor([symbol for target in targets for symbol in target], device=device, dtype=torch.int64)
        with full_precision(device):
            losses_B = F.ctc_loss(
                logits_BFV.float().log_softmax(-1).transpose(0, 1),
                flat_L,
                encoded.lengths_B,
                lengths_B,
                blank=BLANK,
                reduction="none",
                zero_infinity=True,
            )
        total = losses_B.masked_fill(lengths_B == 0, 0.0).sum()
        return LossOutput(total, lengths_B.sum())


def build(config: Config, shape: ModelShape) -> CTC:
    return CTC(config, shape)
