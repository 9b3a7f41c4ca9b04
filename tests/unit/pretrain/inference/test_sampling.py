"""Sampling from a decoder: nucleus, seeds, bounds, repetition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from pretrain.inference.sampling import NoEndError, Sampling, nucleus, sample
from pretrain.interfaces.models import Decoder, DecoderState, Memory
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder

END, START = 6, 7
MEMORY = Memory(torch.zeros(1, 3, 16), torch.tensor([3]))


class Fixed(Decoder):
    """Gives the same logits at every place."""

    max_tokens = 100

    def __init__(self, logits_V: list[float]) -> None:
        super().__init__()
        self.logits_V = torch.tensor([logits_V])

    def forward(self, tokens_BN: Tensor, memories: Sequence[Memory]) -> Tensor:
        raise NotImplementedError

    def start(self, memories: Sequence[Memory]) -> DecoderState:
        return DecoderState(0, (), (), None)

    def step(self, state: DecoderState, tokens_B: Tensor) -> tuple[Tensor, DecoderState]:
        return self.logits_V, state


def written(decoder: Decoder, bounds: tuple[int, int] = (0, 40), **values: float) -> list[int]:
    sampling = Sampling(**values)  # type: ignore[arg-type]
    return sample(decoder, [MEMORY], start=START, end=END, bounds=bounds, sampling=sampling)


def random_decoder() -> TransformerDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(layers=2, heads=2, ffn_dim=32, max_tokens=100)
    return TransformerDecoder(config, dim=16, tokens=8, classes=7).eval()


def test_the_nucleus_has_the_fewest_most_probable_ids() -> None:
    scores_V = np.log([0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(nucleus(scores_V, Sampling(top_p=0.7)), [0, 2 / 3, 0, 1 / 3])
    np.testing.assert_allclose(nucleus(scores_V, Sampling(top_p=1.0)), [0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(nucleus(scores_V, Sampling(temperature=0)), [0, 1, 0, 0])
    half = np.sqrt([0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(nucleus(scores_V, Sampling(temperature=2.0, top_p=1.0)), half / half.sum())


def test_ids_are_drawn_with_their_probabilities() -> None:
    decoder = Fixed([0.0, float(np.log(3.0)), *[-1e9] * 4, 0.0])
    drawn = [written(decoder, (0, 60), seed=seed, top_p=1.0)[:1] for seed in range(600)]
    shares = [sum(ids == wanted for ids in drawn) / len(drawn) for wanted in ([0], [1], [])]
    np.testing.assert_allclose(shares, [0.2, 0.6, 0.2], atol=0.06)


def test_equal_seeds_give_equal_ids_and_others_do_not() -> None:
    decoder = random_decoder()
    texts = [written(decoder, (10, 90), seed=seed, top_p=1.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_ids_are_those_of_the_full_pass() -> None:
    decoder = random_decoder()
    torch.nn.init.constant_(decoder.out.bias[END:], 9.0)  # it ends as soon as it may
    found = written(decoder, (12, 90), temperature=0.0)
    logits_NV = decoder(torch.tensor([[START, *found]]), [MEMORY])[0]
    logits_NV[:12, END] = -torch.inf
    assert logits_NV.argmax(1).tolist() == [*found, END]


def test_the_length_is_within_its_bounds() -> None:
    wants_to_end = Fixed([0.0] * 6 + [9.0])
    assert len(written(wants_to_end, (7, 20))) == 7
    with pytest.raises(NoEndError, match="no end after 20 units"):
        written(Fixed([0.0] * 6 + [-1e9]), (0, 20))


def test_a_sequence_of_four_that_was_written_before_is_drawn_anew() -> None:
    ends_late = Fixed([2.5, 0.0, 0.0, 0.0, 0.0, 0.0, -1.5])
    ids = written(ends_late, (40, 99), top_p=1.0)
    grams = [tuple(ids[n : n + 4]) for n in range(len(ids) - 3)]
    share = 12.18 / (12.18 + 5)  # of the first id: so often would four in a row repeat
    assert grams.count((0, 0, 0, 0)) < 0.5 * share**4 * len(grams)


@pytest.mark.parametrize(("field", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5)])
def test_values_outside_of_their_limits_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
