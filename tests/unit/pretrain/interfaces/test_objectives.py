"""Parts that all heads share: the mix of layers, and what a head shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.monitoring import HeadMedia
from pretrain.interfaces.objectives import Head, HeadPlan, LayerMix, LossOutput


class Showing(Head):
    """A head of which only `keep_media` is used."""

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        raise NotImplementedError

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        raise NotImplementedError


def layers(count: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 5) for _ in range(count))


@pytest.mark.parametrize(("chosen", "number"), [((), 3), ((1,), 1), ((0,), 0)])
def test_one_layer_is_passed_on_without_a_weight(chosen: tuple[int, ...], number: int) -> None:
    mix, given = LayerMix(chosen), layers()
    assert mix(given) is given[number]
    assert list(mix.parameters()) == []


def test_several_layers_are_mixed_by_softmax_from_equal_shares() -> None:
    mix, given = LayerMix((0, 2, 3)), layers()
    torch.testing.assert_close(mix(given), (given[0] + given[2] + given[3]) / 3)
    assert mix.weights_L is not None
    torch.nn.init.constant_(mix.weights_L, 0.0)
    mix.weights_L.data[1] = 50.0
    torch.testing.assert_close(mix(given), given[2])


def test_media_are_made_once_after_a_request_and_asked_again_after_none() -> None:
    head, made = Showing(HeadConfig(name="x")), []

    def make(found: HeadMedia | None) -> HeadMedia | None:
        made.append(found)
        return found

    media = HeadMedia({}, audio={"a": torch.zeros(3)})
    head.keep_media(lambda: make(media))
    assert head.take_media() is None  # nothing was requested
    head.record_next()
    for found in (None, media, media):
        head.keep_media(lambda found=found: make(found))  # type: ignore[misc]
    assert made == [None, media]
    shown = head.take_media()
    assert shown is not None
    assert list(shown.audio) == ["a"]
    assert head.take_media() is None


def test_a_request_ends_when_the_media_are_taken() -> None:
    head = Showing(HeadConfig(name="x"))
    head.record_next()
    assert head.take_media() is None
    head.keep_media(lambda: HeadMedia({}, audio={"a": torch.zeros(3)}))
    assert head.take_media() is None
