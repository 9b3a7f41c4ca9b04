"""Rescoring: ln p of texts against the decoder token by token, and the choice among candidates."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.inference.rescoring import attention_log_probs, best
from pretrain.interfaces.decoding import Candidate
from pretrain.interfaces.models import Memory
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder

VOCABULARY = 3
TEXTS = [(), (0, 2), (1,), (2, 2, 1, 0)]


def decoder(max_tokens: int = 20) -> TransformerDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(layers=1, heads=2, ffn_dim=16, max_tokens=max_tokens)
    made = TransformerDecoder(config, dim=8, tokens=VOCABULARY + 2, classes=VOCABULARY + 1, memories=2)
    return made.double().eval()


def memories() -> list[Memory]:
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 4)
    return [
        Memory(torch.randn(1, size, 8, generator=generator, dtype=torch.float64), torch.tensor([size]))
        for size in sizes
    ]


def by_steps(made: TransformerDecoder, text: tuple[int, ...]) -> float:
    state, score, read = made.start(memories()), 0.0, VOCABULARY + 1
    for token in (*text, VOCABULARY):
        with torch.no_grad():
            logits_1V, state = made.step(state, torch.tensor([read]))
        score, read = score + float(logits_1V.log_softmax(-1)[0, token]), token
    return score


def test_probabilities_equal_the_decoder_token_by_token() -> None:
    made = decoder()
    found = attention_log_probs(made, memories(), TEXTS, VOCABULARY)
    assert found == pytest.approx([by_steps(made, text) for text in TEXTS], abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.99])
def test_the_best_weighted_sum_is_chosen(weight: float) -> None:
    made = decoder()
    first = [Candidate(text, -3.0 * number) for number, text in enumerate(reversed(TEXTS))]
    scores = {c.symbols: (1 - weight) * by_steps(made, c.symbols) + weight * c.log_prob for c in first}
    assert best(first, made, memories(), VOCABULARY, weight) == max(scores, key=lambda text: scores[text])


def test_texts_that_are_too_long_for_the_decoder_lose() -> None:
    made, long = decoder(max_tokens=4), (0, 1, 2, 0)
    assert attention_log_probs(made, memories(), [long, (1,)], VOCABULARY)[0] == -math.inf
    assert best([Candidate(long, 0.0), Candidate((1,), -9.0)], made, memories(), VOCABULARY, 0.3) == (1,)
    assert best([Candidate(long, 0.0), Candidate((*long, 1), -9.0)], made, memories(), VOCABULARY, 0.3) == long
