"""The scale of an fp16 loss: powers of two, halved after an overflow, doubled after many updates without one."""

from __future__ import annotations

import pytest

from pretrain.engines.loss_scaler import FIRST, GROW_EVERY, LARGEST, LossScale


def test_the_scale_grows_after_updates_without_overflow_and_is_bounded() -> None:
    scale = LossScale("fp16")
    for _ in range(GROW_EVERY - 1):
        scale.fitted()
    assert scale.value == FIRST
    scale.fitted()
    assert scale.value == 2 * FIRST
    for _ in range(GROW_EVERY - 1):
        scale.fitted()
    assert scale.lower()
    scale.fitted()
    assert scale.value == FIRST, "an overflow begins the count again"
    scale.value = LARGEST
    for _ in range(2 * GROW_EVERY):
        scale.fitted()
    assert scale.value == LARGEST


def test_an_update_is_repeated_until_the_scale_is_one() -> None:
    scale = LossScale("fp16")
    scale.value = 2.0
    assert scale.lower()
    assert scale.value == 1.0
    assert not scale.lower(), "the gradients themselves are too large"


def test_a_resume_continues_scale_and_count() -> None:
    scale, resumed = LossScale("fp16"), LossScale("fp16")
    scale.lower()
    scale.fitted()
    resumed.load(scale.state())
    assert resumed.state() == scale.state() == {"value": FIRST / 2, "good": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_not_scaled(precision: str) -> None:
    scale = LossScale(precision)
    scale.load(LossScale("fp16").state())
    for _ in range(GROW_EVERY):
        scale.fitted()
    assert (scale.value, scale.state(), scale.lower()) == (1.0, {}, False)
