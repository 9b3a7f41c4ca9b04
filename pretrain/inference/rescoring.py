"""Attention rescoring: an attention decoder ranks the candidates of a first search (Sainath et al., arXiv 1908.10992).

A candidate scores (1 − λ) ln p_att + λ ln p_first, where p_first is the search's own probability of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pretrain.interfaces.decoding import Candidate, Prefix
from pretrain.interfaces.models import Decoder, Memory


def attention_log_probs(
    decoder: Decoder, memories: Sequence[Memory], texts: Sequence[Prefix], vocabulary: int
) -> list[float]:
    """Returns ln p of each text and of its end, all in one pass; −∞ for a text that is too long for the decoder.

    Args:
        decoder: over tokens 0 … vocabulary − 1, then the end and the start mark; in evaluation mode.
        memories: of one row, (1, M, D).
        texts: tokens of each text.
        vocabulary: number of tokens.
    """
    fits = [len(text) < decoder.max_tokens for text in texts]
    kept = [text if fit else () for text, fit in zip(texts, fits, strict=True)]
    longest, end, start = max(map(len, kept)), vocabulary, vocabulary + 1
    device = memories[0].x_BMD.device
    read_BN = torch.tensor([[start, *text, *[end] * (longest - len(text))] for text in kept], device=device)
    target_BN = torch.tensor([[*text, *[end] * (longest + 1 - len(text))] for text in kept], device=device)
    rows = [Memory(m.x_BMD.expand(len(kept), -1, -1), m.lengths_B.expand(len(kept))) for m in memories]
    with torch.inference_mode():
        log_p_BNV = decoder(read_BN, rows).double().log_softmax(-1)
    log_p_BN = log_p_BNV.gather(2, target_BN[:, :, None])[:, :, 0]
    counted_BN = torch.arange(longest + 1, device=device) <= torch.tensor([[len(text)] for text in kept], device=device)
    sums = log_p_BN.masked_fill(~counted_BN, 0.0).sum(1).tolist()
    return [value if fit else -math.inf for value, fit in zip(sums, fits, strict=True)]


def best(
    candidates: Sequence[Candidate], decoder: Decoder, memories: Sequence[Memory], vocabulary: int, weight: float
) -> Prefix:
    """Returns the symbols of the best candidate; of the first one where all are too long for the decoder.

    Args:
        candidates: of the first search, the most probable first.
        decoder, memories, vocabulary: as for `attention_log_probs`.
        weight: λ of the first search.
    """
    attention = attention_log_probs(decoder, memories, [candidate.symbols for candidate in candidates], vocabulary)
    scores = [(1 - weight) * a + weight * c.log_prob for a, c in zip(attention, candidates, strict=True)]
    return candidates[scores.index(max(scores))].symbols
