"""Evaluation metrics on data with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.evaluate import metrics
from pretrain.evaluate.config import ProbeConfig
from pretrain.evaluate.features import Labelled, grid_frames, quarters
from pretrain.evaluate.manifest import Interval, Utterance, grid_labels, require_disjoint
from pretrain.evaluate.probe import View, _fit, fit_probe

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
    assert metrics.equal_error_rate(np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0, 2.0])) == 0.0
    shift = metrics.equal_error_rate(RNG.normal(2, 1, 20_000), RNG.normal(0, 1, 20_000))
    assert shift == pytest.approx(0.1587, abs=0.01)  # Φ(−1)
    same = RNG.normal(0, 1, 20_000)
    assert metrics.equal_error_rate(same, RNG.normal(0, 1, 20_000)) == pytest.approx(0.5, abs=0.02)


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
    one = Utterance(__file__, "a", "speaker-1", "", "", "", "c", "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="speaker-1"):
        require_disjoint([one], [one])


def test_the_probe_selects_the_informative_layer() -> None:
    y_N = torch.from_numpy(RNG.integers(0, 4, 1200))
    x_NLD = torch.from_numpy(RNG.normal(0, 1, (1200, 3, 8))).float()
    x_NLD[:, 1, :4] += 4 * torch.eye(4)[y_N]
    speakers = RNG.integers(0, 5, 1200)
    made = [Labelled(x_NLD[part].half(), y_N[part], speakers[part], tuple("abcde")) for part in
            (slice(0, 800), slice(800, 1000), slice(1000, 1200))]  # fmt: skip
    probe = fit_probe(made[0], made[1], 4, ProbeConfig(epochs=15, lr=1e-2, batch=128), seed=0)
    hits = probe.predict(made[2].x_NLD) == made[2].y_N.numpy()
    assert hits.mean() > 0.9
    assert 1 in probe.layers
    mixed = fit_probe(made[0], made[1], 4, ProbeConfig(epochs=15, lr=1e-2, batch=128), 0, View(False, (0, 1, 2)))
    assert int(mixed.linear.layer_weights_VL.argmax()) == 1
    assert sum(n for _, n in made[2].tally(hits, np.ones(200)).values()) == 200
    assert float(probe.scaling(made[2].x_NLD[:, list(probe.layers)]).float().std(0).sub(1).abs().max()) < 0.3
    # labels shuffled over frames give chance level
    wrong = Labelled(made[0].x_NLD, made[0].y_N[torch.randperm(800)], made[0].speaker_N, made[0].speakers)
    shuffled = fit_probe(wrong, made[1], 4, ProbeConfig(epochs=3, min_updates=20), seed=0).predict(made[2].x_NLD)
    assert (shuffled == made[2].y_N.numpy()).mean() < 0.5


def test_probes_fitted_jointly_equal_those_fitted_alone() -> None:
    y_N = torch.from_numpy(RNG.integers(0, 3, 300))
    x_NLD = torch.from_numpy(RNG.normal(0, 1, (300, 2, 6))).float()
    x_NLD[:, 0, :3] += 2 * torch.eye(3)[y_N]
    part = Labelled(x_NLD.half(), y_N, np.zeros(300, int), ("a",))
    config = ProbeConfig(epochs=1, min_updates=1, batch=32, lr=1e-2)  # after one epoch both have the same best weights
    together = _fit(False, [(0, 1), (0,), (1,)], part, part, 3, config, 0)
    for place, layers in enumerate([(0, 1), (0,), (1,)]):
        alone = fit_probe(part, part, 3, config, 0, View(False, layers))
        torch.testing.assert_close(alone.linear.weight_VCD[0], together[1].weight_VCD[place], rtol=1e-4, atol=1e-5)
        assert (alone.predict(part.x_NLD) == y_N.numpy()).mean() == pytest.approx(together[2][place], abs=0.01)


def test_the_probe_finds_classes_in_low_variance_directions() -> None:
    """One direction has nearly all the variance; the class depends on directions with a thousandth of its width."""
    y_N = torch.from_numpy(RNG.integers(0, 4, 1500))
    inner_ND = torch.from_numpy(RNG.normal(0, 0.1, (1500, 8))).float()
    inner_ND[:, :4] += torch.eye(4)[y_N]
    wide_N1 = torch.from_numpy(RNG.normal(0, 30, (1500, 1))).float()
    x_N1D = (inner_ND + wide_N1)[:, None]
    made = [
        Labelled(x_N1D[part].half().float(), y_N[part], np.zeros(len(y_N[part]), int), ("a",))
        for part in (slice(0, 900), slice(900, 1200), slice(1200, 1500))
    ]
    probe = fit_probe(made[0], made[1], 4, ProbeConfig(epochs=15, lr=1e-2, batch=128), seed=0)
    assert (probe.predict(made[2].x_NLD) == made[2].y_N.numpy()).mean() > 0.9
