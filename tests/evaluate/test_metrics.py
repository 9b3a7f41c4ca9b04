"""Evaluation metrics on data with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.evaluate import metrics
from pretrain.evaluate.features import grid_frames, quarters
from pretrain.evaluate.manifest import Interval, Utterance, grid_labels, require_disjoint

RNG = np.random.default_rng(0)


def test_the_bootstrap_is_paired_by_speaker() -> None:
    # every speaker gains exactly five points, so that the paired interval has zero width
    base = {f"s{i}": (float(10 * i), 100.0) for i in range(1, 9)}
    better = {s: (hits + 5, n) for s, (hits, n) in base.items()}
    gap = metrics.bootstrap([better], 500, [base])
    assert gap.value == pytest.approx(0.05)
    assert (gap.low, gap.high) == pytest.approx((0.05, 0.05))
    alone = metrics.bootstrap([base], 500)
    assert alone.value == pytest.approx(0.45)
    assert alone.low < 0.35
    assert alone.high > 0.55


def test_accuracy_counts_trials_and_averages_seeds() -> None:
    assert metrics.accuracy([{"a": (1, 1), "b": (0, 3)}, {"a": (1, 1), "b": (3, 3)}]) == pytest.approx((0.25 + 1) / 2)


def test_equal_error_rate() -> None:
    same = np.arange(40_000) < 20_000
    assert metrics.equal_error_rate(np.array([3.0, 4.0, 5.0, 0.0, 1.0, 2.0]), np.arange(6) < 3) == 0.0
    shift = metrics.equal_error_rate(RNG.normal(0, 1, 40_000) + 2 * same, same)
    assert shift == pytest.approx(0.1587, abs=0.01)  # Φ(−1)
    assert metrics.equal_error_rate(RNG.normal(0, 1, 40_000), same) == pytest.approx(0.5, abs=0.02)


def test_pnmi_of_the_same_and_of_independent_labels() -> None:
    phones = RNG.integers(0, 10, 50_000)
    assert metrics.phone_normalized_mutual_information(phones, phones + 7) == pytest.approx((1.0, 1.0, 1.0))
    value, purity, _ = metrics.phone_normalized_mutual_information(phones, RNG.integers(0, 10, 50_000))
    assert value < 0.01
    assert purity == pytest.approx(0.1, abs=0.02)


def test_grid_labels_are_the_phones_at_the_middle_of_each_cell() -> None:
    intervals = [Interval(0.0, 0.05, "A"), Interval(0.05, 0.10, "B")]
    assert grid_labels(intervals, 0.13, 50) == ["A", "A", "B", "B", "B", ""]


@pytest.mark.parametrize("rate_hz", [12.5, 25.0, 50.0, 100.0])
def test_grid_frames_are_the_nearest_frames(rate_hz: float) -> None:
    frames = grid_frames(rate_hz, int(2 * rate_hz), 100)
    middles = (frames + 0.5) / rate_hz
    assert float((middles - (torch.arange(100) + 0.5) / 50).abs().max()) <= 0.5 / rate_hz + 1e-6


def test_quarters_are_means_in_order_of_time() -> None:
    assert quarters(torch.tensor([[[1.0], [1.0], [2.0], [3.0], [4.0]]])).tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_speakers_shared_by_train_and_test_are_refused() -> None:
    one = Utterance(__file__, "a", "speaker-1")
    with pytest.raises(ValueError, match="speaker-1"):
        require_disjoint([one], [one])
