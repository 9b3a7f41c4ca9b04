"""MFCC at lower rates, and their silence."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.features import HOP, WINDOW, kaldi_mfcc
from tests.support.contract_cases import speech_like


@pytest.mark.parametrize("rate_hz", [50, 25])
def test_frames_at_a_lower_rate_are_means(rate_hz: int) -> None:
    wave = speech_like(1.003, 0).numpy()
    fine, coarse = kaldi_mfcc().compute(wave), kaldi_mfcc(rate_hz).compute(wave)
    size = 100 // rate_hz
    assert len(coarse) == -(-len(fine) // size)
    for number in (0, 7, len(coarse) - 1):
        np.testing.assert_allclose(coarse[number], fine[number * size : (number + 1) * size].mean(0), rtol=1e-5)
    assert kaldi_mfcc(rate_hz).compute(wave[:300]).shape == (0, 39)
    assert kaldi_mfcc(rate_hz).rate_hz == rate_hz


def test_frames_far_below_the_loudest_one_are_zero() -> None:
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    wave = np.concatenate([1e-4 * noise, speech_like(1.0, 0).numpy(), 1e-4 * noise])
    found, silent = kaldi_mfcc(50).compute(wave), kaldi_mfcc(50, 35.0).compute(wave)
    zero = (silent == 0).all(1)
    np.testing.assert_array_equal(silent[~zero], found[~zero])
    assert zero[:48].all()
    assert zero[102:].all()
    power = [np.square(wave[n * HOP : n * HOP + WINDOW]).mean() for n in range(1 + (len(wave) - WINDOW) // HOP)]
    pairs = np.array(power)[: len(power) // 2 * 2].reshape(-1, 2).mean(1)
    expected = pairs < pairs.max() * 10**-3.5
    np.testing.assert_array_equal(zero[: len(pairs)], expected)


def test_rates_and_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rate_hz=30: must divide 100"):
        kaldi_mfcc(30)
    for values in ({"rate_hz": 30}, {"rate_hz": 50, "features": "pitch"}, {"silence_db": 35, "features": "runs/X"}):
        with pytest.raises(ConfigError, match=r"rate_hz|silence_db"):
            load(TargetsConfig, {"shards": "shards", "out": "out", **values})
