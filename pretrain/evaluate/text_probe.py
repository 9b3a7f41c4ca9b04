"""Text from frozen features: one linear layer on a weighted sum of the encoder's layers, by CTC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng, keyed_seed
from pretrain.evaluate.config import TextProbeConfig
from pretrain.evaluate.early_stopping import EarlyStopping
from pretrain.recognition.error_rates import edits

BLANK = 0


class UtteranceFeatures(NamedTuple):
    """Features and text of one utterance.  x_LFD: float16 features of every layer."""

    x_LFD: Tensor
    text: str
    speaker: str


class TextProbe(nn.Module):
    """(L, F, D) features to the scores of blank and symbols, (F, 1 + symbols)."""

    def __init__(self, example: Tensor, symbols: str) -> None:
        super().__init__()
        self.symbols = symbols
        self.mix_L = nn.Parameter(torch.zeros(len(example)))
        self.norm = nn.LayerNorm(example.shape[2])
        self.linear = nn.Linear(example.shape[2], 1 + len(symbols))

    def forward(self, x_LFD: Tensor) -> Tensor:
        layers_LFD = F.layer_norm(x_LFD.float(), x_LFD.shape[2:])  # layers differ in scale
        logits_FC: Tensor = self.linear(self.norm(torch.einsum("l,lfd->fd", self.mix_L.softmax(0), layers_LFD)))
        return logits_FC

    def ids(self, text: str) -> Tensor:
        """Returns the symbols of a text as numbers from 1; others are left out."""
        return torch.tensor([1 + at for symbol in text if (at := self.symbols.find(symbol)) >= 0], dtype=torch.long)

    @torch.inference_mode()
    def read(self, x_LFD: Tensor) -> str:
        """Returns the text of the best path."""
        best_F = self(x_LFD).argmax(1)
        kept_F = torch.cat([best_F[:1], best_F[1:][best_F[1:] != best_F[:-1]]])
        return "".join(self.symbols[at - 1] for at in kept_F.tolist() if at != BLANK)


def fit_text(
    train: Sequence[UtteranceFeatures], valid: Sequence[UtteranceFeatures], config: TextProbeConfig, seed: int
) -> TextProbe:
    """Fits a probe until the character errors of the validation speakers no longer fall.

    Args:
        train: utterances to fit.
        valid: those of the validation speakers.
        config: learning rate, epochs and patience.
        seed: seed of the initial weights and of the order of utterances.
    """
    symbols = "".join(sorted({symbol for spoken in train for symbol in spoken.text}))
    torch.manual_seed(keyed_seed(seed, "text probe"))
    probe = TextProbe(train[0].x_LFD, symbols)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.lr)
    stopping = EarlyStopping(probe, config.patience)
    for epoch in range(config.epochs):
        order = keyed_rng(seed, epoch, "text probe").permutation(len(train))
        for start in range(0, len(order), config.batch):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(probe, [train[i] for i in order[start : start + config.batch]]))
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimizer.step()
        if stopping.ends_after(-error_rate(probe, valid)):
            break
    stopping.restore_best()
    return probe


def _loss(probe: TextProbe, batch: Sequence[UtteranceFeatures]) -> Tensor:
    """Returns the mean CTC loss per symbol; texts longer than their frames count as 0."""
    total, symbols = torch.zeros(()), 0
    for spoken in batch:
        ids_N, log_p_FC = probe.ids(spoken.text), probe(spoken.x_LFD).log_softmax(1)
        lengths = torch.tensor([len(log_p_FC)]), torch.tensor([len(ids_N)])
        total = total + F.ctc_loss(
            log_p_FC[:, None], ids_N[None], *lengths, blank=BLANK, reduction="sum", zero_infinity=True
        )
        symbols += len(ids_N)
    return total / max(1, symbols)


def error_rate(probe: TextProbe, part: Sequence[UtteranceFeatures]) -> float:
    """Returns character errors / characters."""
    counts = np.array(edits([s.text for s in part], [probe.read(s.x_LFD) for s in part], by_words=False))
    return float(counts[:, 0].sum() / max(1, counts[:, 1].sum()))


def counted(probe: TextProbe, part: Sequence[UtteranceFeatures], by_words: bool) -> dict[str, tuple[float, float]]:
    """Returns errors and reference units of each speaker."""
    counts = edits([s.text for s in part], [probe.read(s.x_LFD) for s in part], by_words)
    sums: dict[str, np.ndarray] = {}
    for spoken, count in zip(part, counts, strict=True):
        sums[spoken.speaker] = sums.get(spoken.speaker, np.zeros(2)) + np.array(count)
    return {speaker: (float(found[0]), float(found[1])) for speaker, found in sums.items()}
