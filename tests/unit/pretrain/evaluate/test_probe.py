"""Probes: the minimum that scikit-learn finds, the choice of layer and penalty, and folds of speakers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.evaluate.config import ProbeConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.probe import Probe, Scaling, View, fit, fit_probe, fits, folds

RNG = np.random.default_rng(0)
CONFIG = ProbeConfig(iterations=100, tolerance=1e-7)


def labelled(x_NLD: torch.Tensor, y_N: torch.Tensor, speakers: int = 1) -> Labelled:
    owners = np.arange(len(y_N)) % speakers
    return Labelled(x_NLD, y_N, owners, tuple(f"s{i}" for i in range(speakers)))


def informative(count: int, layers: int, layer: int, speakers: int = 5) -> Labelled:
    y_N = torch.from_numpy(RNG.integers(0, 4, count))
    x_NLD = torch.from_numpy(RNG.normal(0, 1, (count, layers, 8))).float()
    x_NLD[:, layer, :4] += 4 * torch.eye(4)[y_N]
    return labelled(x_NLD.half(), y_N, speakers)


def test_the_minimum_is_that_of_scikit_learn() -> None:
    """Features of very different scales, correlated, and classes that overlap."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND = RNG.normal(0, 1, (600, 6)) @ RNG.normal(0, 1, (6, 6)) * np.array([100, 10, 1, 1, 0.1, 0.01])
    y_N = (x_ND @ RNG.normal(0, 1, (6, 3)) / x_ND.std(0).mean() + RNG.gumbel(0, 1, (600, 3))).argmax(1)
    standard_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    theirs = linear_model.LogisticRegression(C=1 / (1e-3 * 600), tol=1e-8, max_iter=5_000).fit(standard_ND, y_N)
    part = labelled(torch.from_numpy(x_ND)[:, None].float(), torch.from_numpy(y_N))
    probe = fit(part, 3, View((0,), 1e-3), ProbeConfig(iterations=500, tolerance=1e-9))
    ours_NC = probe.weights.logits(probe.scaling(part.x_NLD)).softmax(1)
    assert np.abs(ours_NC.numpy() - theirs.predict_proba(standard_ND)).max() < 2e-3
    assert (probe.predict(part.x_NLD) == theirs.predict(standard_ND)).mean() > 0.995


def test_the_informative_layer_is_chosen_and_shuffled_labels_score_chance() -> None:
    train, valid, test = informative(800, 3, 1), informative(200, 3, 1), informative(200, 3, 1)
    probe = fit_probe(train, valid, 4, CONFIG)
    hits = probe.predict(test.x_NLD) == test.y_N.numpy()
    assert hits.mean() > 0.9
    assert 1 in probe.view.layers
    mixed = fit(train, 4, View((0, 1, 2), 1e-3), CONFIG)
    assert int(mixed.weights.mix_L.argmax()) == 1
    assert sum(n for _, n in test.tally(hits, np.ones(200)).values()) == 200
    wrong = Labelled(train.x_NLD, train.y_N[torch.randperm(800)], train.speaker_N, train.speakers)
    shuffled = fit_probe(wrong, valid, 4, CONFIG).predict(test.x_NLD)
    assert (shuffled == test.y_N.numpy()).mean() < 0.5


def test_a_probe_depends_on_no_draw_and_a_warm_start_reaches_the_same_minimum() -> None:
    train = informative(300, 1, 0)
    once, again = (fit(train, 4, View((0,), 1e-4), CONFIG) for _ in range(2))
    assert torch.equal(once.weights.weight_DC, again.weights.weight_DC)
    *_, warm = fits(train, 4, (0,), [1e-2, 1e-4], CONFIG)
    x_LND = once.scaling(train.x_NLD)
    assert torch.allclose(once.weights.logits(x_LND).softmax(1), warm.weights.logits(x_LND).softmax(1), atol=0.02)


def test_classes_in_directions_of_low_variance_are_found() -> None:
    """One direction has nearly all the variance; the class depends on directions with a thousandth of its width."""
    y_N = torch.from_numpy(RNG.integers(0, 4, 1500))
    inner_ND = torch.from_numpy(RNG.normal(0, 0.1, (1500, 8))).float()
    inner_ND[:, :4] += torch.eye(4)[y_N]
    x_N1D = (inner_ND + torch.from_numpy(RNG.normal(0, 30, (1500, 1))).float())[:, None].half().float()
    parts = [labelled(x_N1D[at : at + 500], y_N[at : at + 500]) for at in (0, 500, 1000)]
    probe = fit_probe(parts[0], parts[1], 4, CONFIG)
    assert (probe.predict(parts[2].x_NLD) == parts[2].y_N.numpy()).mean() > 0.9


def test_coordinates_are_the_eigenvectors_of_the_covariance() -> None:
    part = informative(2_000, 1, 0)
    scaling = Scaling(part.x_NLD)
    x_ND = scaling(part.x_NLD)[0]
    rotated_NR = x_ND @ scaling.vectors_DR
    covariance_RR = rotated_NR.T @ rotated_NR / len(x_ND)
    assert torch.allclose(covariance_RR, torch.diag(scaling.values_R), atol=1e-3)
    assert torch.allclose(x_ND.std(0, unbiased=False), torch.ones(8), atol=1e-2)


def test_few_validation_speakers_are_replaced_by_folds_of_training_speakers() -> None:
    """Each speaker is judged once, and never by a probe that was fitted to it."""
    train, valid = informative(120, 1, 0, speakers=6), informative(40, 1, 0, speakers=2)
    valid = Labelled(valid.x_NLD, valid.y_N, valid.speaker_N, ("v0", "v1"))
    judged = []
    for some, judge in folds(train, valid, CONFIG, disjoint=True):
        fitted, seen = ({part.speakers[i] for i in part.speaker_N} for part in (some, judge))
        assert not fitted & seen
        judged += sorted(seen)
    assert sorted(judged) == [*(f"s{i}" for i in range(6)), "v0", "v1"]
    enough = informative(40, 1, 0, speakers=5)
    [(_, only)] = folds(train, enough, CONFIG, disjoint=True)
    assert only is enough
    [(_, only)] = folds(train, valid, CONFIG, disjoint=False)  # classes that only their speakers have
    assert only is valid


def test_fewer_vectors_than_dimensions_reach_the_same_minimum() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND, y_N = RNG.normal(0, 1, (60, 200)), RNG.integers(0, 3, 60)
    x_ND[:, :3] += 2 * np.eye(3)[y_N]
    standard_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    theirs = linear_model.LogisticRegression(C=1 / (1e-2 * 60), tol=1e-8, max_iter=5_000).fit(standard_ND, y_N)
    part = labelled(torch.from_numpy(x_ND)[:, None].float(), torch.from_numpy(y_N))
    probe = fit(part, 3, View((0,), 1e-2), ProbeConfig(iterations=500, tolerance=1e-9))
    others_ND = RNG.normal(0, 1, (50, 200))
    x_LND = probe.scaling(torch.from_numpy(others_ND)[:, None].float())
    expected_NC = theirs.predict_proba((others_ND - x_ND.mean(0)) / x_ND.std(0))
    assert np.abs(probe.weights.logits(x_LND).softmax(1).numpy() - expected_NC).max() < 5e-3


def test_the_penalty_fits_the_number_of_vectors_that_it_is_used_with() -> None:
    """A twentieth of the vectors needs a stronger penalty than all of them, whose accuracy must not suffer from it."""
    mixing_DD = RNG.normal(0, 1, (60, 60))

    def drawn(count: int) -> Labelled:
        y_N = RNG.integers(0, 8, count)
        x_ND = RNG.normal(0, 1, (count, 60))
        x_ND[:, :8] += np.eye(8)[y_N]
        return labelled(torch.from_numpy(x_ND @ mixing_DD)[:, None].float(), torch.from_numpy(y_N), speakers=5)

    train, valid, test = drawn(4_000), drawn(1_500), drawn(4_000)
    config = ProbeConfig(choice_vectors=200)
    few = fit_probe(
        Labelled(train.x_NLD[::20], train.y_N[::20], train.speaker_N[::20], train.speakers), valid, 8, config
    )
    chosen = fit_probe(train, valid, 8, config)
    assert chosen.view.l2 < few.view.l2

    def right(probe: Probe) -> float:
        return float((probe.predict(test.x_NLD) == test.y_N.numpy()).mean())

    best = max(right(probe) for probe in fits(train, 8, (0,), sorted(config.l2, reverse=True), config))
    assert right(chosen) > best - 0.01
    assert right(chosen) > right(fit(train, 8, few.view, config)), "the penalty of few vectors is too strong for many"


def test_after_folds_the_penalty_is_divided_by_the_increase_of_vectors() -> None:
    train, valid = informative(800, 1, 0, speakers=6), informative(40, 1, 0, speakers=2)
    probe = fit_probe(train, valid, 4, ProbeConfig(choice_vectors=80))
    [(some, _), *_] = folds(train, valid, ProbeConfig(choice_vectors=80), disjoint=True)
    assert any(probe.view.l2 == pytest.approx(l2 * len(some.y_N) / 800) for l2 in ProbeConfig().l2)
