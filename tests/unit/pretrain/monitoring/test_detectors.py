"""Every detector finds a planted failure and raises no alarm on healthy metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.monitoring import detectors

RNG = np.random.default_rng(0)
EVEN = np.full(320, 100.0)
ZIPF = np.rint(1e6 / np.arange(1, 321))
"""Unequal, as healthy targets are: perplexity near half of the book."""


def test_the_gradient_limit_follows_the_median_once_enough_updates_are_seen() -> None:
    assert detectors.gradient_limit([1.0] * 19, 10.0) == math.inf
    assert detectors.gradient_limit([1.0] * 30 + [50.0] * 3, 10.0) == 10.0
    assert detectors.gradient_limit([0.08] * 30, 10.0, floor=10.0) == 10.0


@pytest.mark.parametrize(
    ("planted", "healthy"),
    [
        (detectors.gradient_spike(11.0, 10.0), detectors.gradient_spike(9.0, 10.0)),
        (detectors.at_chance(4.61, math.log(101), 0.01), detectors.at_chance(4.3, math.log(101), 0.01)),
        (detectors.accuracy_at_chance(0.0101, 1 / 101), detectors.accuracy_at_chance(0.02, 1 / 101)),
        (detectors.off_scale("features", -6.0, 4.0), detectors.off_scale("features", 0.02, 0.98)),
        (detectors.off_scale("features", 0.0, 0.1), detectors.off_scale("features", -0.3, 1.4)),
        (detectors.too_good(0.01, 4.6, 3.0, 200.0), detectors.too_good(0.01, 4.6, 190.0, 200.0)),
        (detectors.too_good(0.01, 4.6, 3.0, 200.0), detectors.too_good(2.0, 4.6, 3.0, 200.0)),
        (detectors.low_code_use(np.eye(320)[0] * 1e5, 0.1), detectors.low_code_use(EVEN, 0.1)),
        (detectors.low_code_use(np.eye(320)[:20].sum(0) * 1e4, 0.1), detectors.low_code_use(ZIPF, 0.1)),
        (detectors.dead_codes(np.where(np.arange(320) < 100, 1e3, 0), 0.5), detectors.dead_codes(ZIPF, 0.5)),
        (detectors.low_target_entropy(np.eye(320)[:5].sum(0) * 1e3, 0.6), detectors.low_target_entropy(ZIPF, 0.6)),
        (detectors.shrunken("stem", 0.05, 1.0, 0.1), detectors.shrunken("stem", 0.3, 1.0, 0.1)),
        (detectors.shrunken("stem", 0.0, 0.0, 0.1), detectors.shrunken("layer_3", 40.0, 1.0, 0.1)),
        (detectors.shrunken("stem", math.nan, 1.0, 0.1), detectors.shrunken("stem", 1.0, 1.0, 0.1)),
        (detectors.rank_fell("layer_1", 6.3, 56.8, 0.2), detectors.rank_fell("layer_1", 29.3, 101.0, 0.2)),
        (detectors.falling("probe", [0.5, 0.4, 0.3, 0.2]), detectors.falling("probe", [0.5, 0.4, 0.41, 0.4])),
        (detectors.falling("probe", [0.1, 0.5, 0.4, 0.3, 0.2]), detectors.falling("probe", [0.5, 0.4, 0.3])),
        (detectors.wrong_audio(2800.0, 5600.0, 0.1), detectors.wrong_audio(5400.0, 5600.0, 0.1)),
        (detectors.waiting_ranks({0: 0.0, 1: 0.8}, 1.0, 0.5), detectors.waiting_ranks({0: 0.0, 1: 0.1}, 1.0, 0.5)),
    ],
)
def test_planted_failures_are_found_and_healthy_metrics_raise_no_alarm(
    planted: detectors.Finding | None, healthy: detectors.Finding | None
) -> None:
    assert healthy is None
    assert planted is not None
    sentence = planted.sentence(40)
    assert "since step 40" in sentence
    assert "what usually helps" in sentence
    assert "\n" not in sentence


def test_the_slow_rank_is_named() -> None:
    found = detectors.waiting_ranks({0: 0.1, 7: 0.9, 3: 0.2}, 1.0, 0.5)
    assert found is not None
    assert "rank 7" in found.seen


def test_too_few_counts_raise_no_alarm() -> None:
    assert detectors.low_code_use(np.eye(320)[0] * 100, 0.1) is None
    assert detectors.dead_codes(np.eye(8192)[0] * 5000, 0.5) is None


def test_skewed_use_of_a_large_codebook_is_not_a_collapse() -> None:
    share = np.exp(-1.4 * np.log(np.arange(1, 8193)))
    counts = np.rint(share / share.sum() * 1e6)
    perplexity = math.exp(detectors.entropy(counts))
    assert perplexity < 819
    assert (detectors.low_code_use(counts, 0.1) is None) == (perplexity >= 8192**0.6)


def test_the_entropy_estimate_is_corrected_for_few_counts() -> None:
    draws = [np.bincount(np.random.default_rng(i).integers(0, 100, 300), minlength=100) for i in range(50)]
    assert np.mean([detectors.entropy(counts) for counts in draws]) == pytest.approx(math.log(100), abs=0.06)


def test_rank_me_equals_the_number_of_used_dimensions() -> None:
    wide = RNG.standard_normal((500, 32))
    assert detectors.rank_me(wide) > 28
    assert detectors.rank_me(wide[:, :3] @ RNG.standard_normal((3, 32))) == pytest.approx(3, abs=0.3)
    assert detectors.rank_me(np.ones((500, 32))) == 1.0


def test_a_head_that_cannot_use_most_of_its_labels_is_found() -> None:
    assert detectors.unusable_labels("text", 5, 10) is None
    assert detectors.unusable_labels("text", 0, 0) is None
    found = detectors.unusable_labels("text", 6, 10)
    assert found is not None
    assert "6 of 10" in found.seen
