"""Measures of separation against torchmetrics and enumeration; spectra against their inverse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    scale_invariant_signal_noise_ratio,
    signal_noise_ratio,
)

from pretrain.nn.separation import Spectra, best_assignment, clustering_loss, negative_snr, si_snr
from tests.support.parity_table import Parity, difference


def signals(sources: int, rows: int = 6, samples: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns estimates and targets, (B, S, T); the estimates are in another order and not perfect."""
    torch.manual_seed(sources)
    targets_BST = torch.randn(rows, sources, samples) * torch.rand(rows, sources, 1)
    order_BS = torch.stack([torch.randperm(sources) for _ in range(rows)])
    shuffled_BST = torch.stack([row[order] for row, order in zip(targets_BST, order_BS, strict=True)])
    return shuffled_BST + torch.rand(rows, sources, 1) * torch.randn(rows, sources, samples), targets_BST


@pytest.mark.parametrize("sources", [2, 3])
def test_the_best_order_and_its_si_snr_equal_torchmetrics(sources: int, parity: Parity) -> None:
    estimates_BST, targets_BST = signals(sources)
    best = best_assignment(-si_snr(estimates_BST[:, :, None], targets_BST[:, None]))
    expected_B, order_BS = permutation_invariant_training(
        estimates_BST, targets_BST, scale_invariant_signal_noise_ratio
    )
    parity(
        "separation: SI-SNR of the best permutation against torchmetrics",
        1e-5,
        difference(-best.cost_B / sources, expected_B),
    )
    assert torch.equal(best.order_BS, order_BS)
    arranged_BST = best.arranged(estimates_BST)
    same = scale_invariant_signal_noise_ratio(arranged_BST, targets_BST)
    parity("separation: SI-SNR against torchmetrics", 1e-5, difference(si_snr(arranged_BST, targets_BST), same))


def test_the_snr_without_its_limit_equals_torchmetrics(parity: Parity) -> None:
    estimates_BST, targets_BST = signals(2)
    found = -negative_snr(estimates_BST, targets_BST, targets_BST.sum(1, keepdim=True), limit_db=200.0)
    parity(
        "separation: SNR against torchmetrics", 1e-5, difference(found, signal_noise_ratio(estimates_BST, targets_BST))
    )


def test_padding_does_not_change_the_si_snr() -> None:
    estimates_BST, targets_BST = signals(2)
    padded = [torch.nn.functional.pad(x, (0, 300)) for x in (estimates_BST, targets_BST)]
    torch.testing.assert_close(si_snr(*padded, torch.tensor(900)), si_snr(estimates_BST, targets_BST))


def test_a_silent_target_costs_the_level_of_its_estimate() -> None:
    mixture_T, silence_T = torch.randn(1000), torch.zeros(1000)
    for level_db in (0.0, -10.0, -20.0):
        estimate_T = mixture_T * 10 ** (level_db / 20)
        assert float(negative_snr(estimate_T, silence_T, mixture_T)) == pytest.approx(level_db, abs=0.5)
    estimate_T = torch.zeros(1000, requires_grad=True)
    cost = negative_snr(estimate_T, silence_T, mixture_T)
    cost.backward()
    assert float(cost.detach()) == pytest.approx(-30.0, abs=1e-3)
    assert estimate_T.grad is not None
    assert torch.isfinite(estimate_T.grad).all()
    assert torch.isfinite(negative_snr(silence_T, silence_T, silence_T))


def test_gradients_are_those_of_the_best_permutation() -> None:
    costs = torch.rand(4, 3, 3, requires_grad=True)
    best = best_assignment(costs)
    for row in range(4):
        sums = {
            order: float(sum(costs[row, order[target], target] for target in range(3)))
            for order in itertools.permutations(range(3))
        }
        assert tuple(best.order_BS[row].tolist()) == min(sums, key=lambda order: sums[order])
    best.cost_B.sum().backward()
    assert costs.grad is not None
    assert torch.equal(costs.grad.sum((1, 2)), torch.full((4,), 3.0))


def test_the_clustering_loss_equals_its_definition(parity: Parity) -> None:
    torch.manual_seed(0)
    v_BNE = torch.nn.functional.normalize(torch.randn(3, 40, 5, dtype=torch.float64), dim=2)
    y_BNS = torch.nn.functional.one_hot(torch.randint(2, (3, 40)), 2).double()
    weights_BN = torch.rand(3, 40, dtype=torch.float64)
    difference_BNN = v_BNE @ v_BNE.transpose(1, 2) - y_BNS @ y_BNS.transpose(1, 2)
    expected_B = (difference_BNN.square() * weights_BN[:, :, None] * weights_BN[:, None]).sum((1, 2))
    error = difference(clustering_loss(v_BNE, y_BNS, weights_BN), expected_B)
    parity("separation: deep clustering against its definition, fp64", 1e-12, error)


@pytest.mark.parametrize("samples", [1, 255, 256, 5000])
def test_spectra_are_inverted_and_do_not_depend_on_padding(samples: int) -> None:
    spectra, wave_BT = Spectra(512, 128), torch.randn(2, samples)
    made_BKC = spectra(wave_BT)
    torch.testing.assert_close(spectra.inverse(made_BKC, samples), wave_BT, rtol=1e-4, atol=1e-5)
    wide_BKC = spectra(torch.nn.functional.pad(wave_BT, (0, 777)))
    frames = int(spectra.lengths(torch.tensor([samples])))
    torch.testing.assert_close(wide_BKC[:, :frames], made_BKC[:, :frames])
    assert not wide_BKC[:, frames:].any()
