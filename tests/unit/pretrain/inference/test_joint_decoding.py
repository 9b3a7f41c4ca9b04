"""Joint beam search: prefix scores and best texts against enumeration, ends, and loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain.inference.joint_decoding import (
    Decoded,
    JointConfig,
    PrefixScores,
    compression_ratio,
    decode,
    joint_search,
)
from pretrain.interfaces.models import Memory
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder
from tests.support.parity_table import Parity

VOCABULARY, FRAMES = 3, 5


def log_probs(seed: int = 0, frames: int = FRAMES, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(frames, VOCABULARY + 1, generator=generator, dtype=torch.float64)).log_softmax(1)


def texts_by_path(log_probs_FV: Tensor) -> dict[tuple[int, ...], float]:
    """Sums the probability of every path by the text that it gives."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(VOCABULARY + 1), repeat=len(log_probs_FV)):
        text = tuple(label - 1 for label, _ in itertools.groupby(path) if label)
        p = math.exp(sum(float(log_probs_FV[frame, label]) for frame, label in enumerate(path)))
        found[text] = found.get(text, 0.0) + p
    return found


@pytest.mark.parametrize("seed", range(3))
def test_prefix_scores_equal_enumeration(seed: int, parity: Parity) -> None:
    log_probs_FV = log_probs(seed)
    exact, scores = texts_by_path(log_probs_FV), PrefixScores(log_probs_FV)
    states = {(): scores.empty()}
    assert float(scores.whole(states[()]).exp()) == pytest.approx(exact[()], rel=1e-12)
    worst = 0.0
    for length in range(1, FRAMES + 2):
        for prefix in itertools.product(range(VOCABULARY), repeat=length - 1):
            last = prefix[-1] if prefix else -1
            begins_K, states_K = scores.extend(states[prefix], last, torch.arange(VOCABULARY))
            for token in range(VOCABULARY):
                longer = (*prefix, token)
                states[longer] = states_K[token]
                begin = sum(p for text, p in exact.items() if text[:length] == longer)
                whole = float(scores.whole(states_K[token]).exp())
                worst = max(worst, abs(float(begins_K[token].exp()) - begin), abs(whole - exact.get(longer, 0.0)))
    parity("CTC prefix scores against the sum over all paths, fp64", 1e-13, worst)


def test_prefix_scores_of_a_long_utterance_are_finite() -> None:
    log_probs_FV = log_probs(0, frames=3000, sharpness=20.0)
    scores = PrefixScores(log_probs_FV)
    begins, states = scores.extend(scores.empty(), -1, torch.arange(VOCABULARY))
    whole = -torch.nn.functional.ctc_loss(
        log_probs_FV[:, None], torch.tensor([[2]]), torch.tensor([3000]), torch.tensor([1]), reduction="none"
    )
    assert torch.isfinite(begins).all()
    assert float(scores.whole(states[1])) == pytest.approx(float(whole), rel=1e-9)


def model(bias_of_end: float = 0.0) -> tuple[TransformerDecoder, Memory]:
    torch.manual_seed(0)
    config = DecoderConfig(layers=1, heads=2, ffn_dim=16, max_tokens=200)
    made = TransformerDecoder(config, dim=8, tokens=VOCABULARY + 2, classes=VOCABULARY + 1).eval()
    with torch.no_grad():
        made.out.weight.mul_(3)
        made.out.bias[VOCABULARY] += bias_of_end
    return made, Memory(torch.randn(1, FRAMES, 8), torch.tensor([FRAMES]))


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_a_wide_beam_finds_the_best_of_all_texts(weight: float, bonus: float) -> None:
    decoder, memory = model()
    log_probs_FV = log_probs()
    exact = texts_by_path(log_probs_FV)
    config = JointConfig(beam=200, ctc_weight=weight, bonus=bonus, tokens_per_second=3.0)
    scored: dict[tuple[int, ...], float] = {}
    for length in range(5):  # at most 4 tokens in a second
        for text in itertools.product(range(VOCABULARY), repeat=length):
            log_p_NV = decoder(torch.tensor([[VOCABULARY + 1, *text]]), [memory])[0].double().log_softmax(-1)
            attention = sum(float(log_p_NV[place, token]) for place, token in enumerate([*text, VOCABULARY]))
            ctc = weight * math.log(exact[text]) if weight and text in exact else (-math.inf if weight else 0.0)
            scored[text] = (1 - weight) * attention + ctc + bonus * length
    best = max(scored, key=scored.__getitem__)
    found = joint_search(decoder, [memory], log_probs_FV, vocabulary=VOCABULARY, seconds=1.0, config=config)
    assert (tuple(found.tokens), found.by) == (best, "joint" if weight else "attention")
    assert found.score == pytest.approx(scored[best], abs=1e-5)


def test_the_ctc_prefix_ends_a_decoder_that_never_does() -> None:
    decoder, memory = model(bias_of_end=-20.0)
    alone, joint = (
        joint_search(
            decoder, [memory], log_probs(), vocabulary=VOCABULARY, seconds=4.0, config=JointConfig(ctc_weight=w)
        )
        for w in (0.0, 0.3)
    )
    assert len(joint.tokens) <= FRAMES
    assert len(alone.tokens) <= 101  # 25 tokens a second


def test_a_loop_is_decoded_by_ctc_alone() -> None:
    decoder, memory = model()
    log_probs_FV = log_probs()

    def found(text: str) -> Decoded:
        return decode(
            decoder, [memory], log_probs_FV, vocabulary=VOCABULARY, seconds=1.0, config=JointConfig(),
            text_of=lambda _: text,
        )  # fmt: skip

    exact = texts_by_path(log_probs_FV)
    assert found("a short text").by == "joint"
    assert (found("over and " * 40).by, tuple(found("over and " * 40).tokens)) == ("ctc", max(exact, key=exact.get))  # type: ignore[arg-type]
    assert compression_ratio("") == 0.0
