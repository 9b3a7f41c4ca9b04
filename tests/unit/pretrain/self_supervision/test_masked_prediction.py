"""Units fitted during the run: k-means after the first update, later relabelling from a layer."""

from __future__ import annotations

import torch

from pretrain.interfaces.frames import StepContext
from pretrain.nn.spectral import delta
from pretrain.self_supervision.kmeans import kmeans
from pretrain.self_supervision.masked_prediction import MaskedUnits
from tests.support.contract_cases import batch, make


def test_units_are_fitted_after_the_first_update_and_again_when_due() -> None:
    module = make("hubert", units=8, relabel_step=2, relabel_layer=1, relabel_units=12)
    units = module.objective
    assert isinstance(units, MaskedUnits)
    centres, layer_centres = units.centres_KD.clone(), units.layer_centres_KD.clone()
    histograms = []
    for step in range(5):
        ctx = StepContext(0, step)
        plan = module.prepare(batch(), ctx)
        loss, metrics = module(batch(), plan, plan.counts_K, ctx)
        loss.backward()
        module.after_step(ctx)
        histograms.append(metrics["hist/codes"][0])
        assert torch.equal(units.centres_KD, centres) == (step < 0)
        assert torch.equal(units.layer_centres_KD, layer_centres) == (step < 2)
    assert [len(histogram) for histogram in histograms] == [8, 8, 8, 12, 12]
    assert (histograms[1] > 0).sum() >= 6, "k-means uses nearly all units"
    assert units.teacher is not None
    assert not any(weight.requires_grad for weight in units.teacher.parameters())


def test_the_configured_feature_type_is_used() -> None:
    """Pitfall: a script that hard-codes the features and ignores the flag."""
    widths = {}
    for kind in ("mfcc", "log_mel"):
        objective = make("hubert", features=kind).objective
        assert isinstance(objective, MaskedUnits)
        widths[kind] = objective.centres_KD.shape[1]
    assert widths == {"mfcc": 39, "log_mel": 80}


def test_kmeans_uses_every_centre() -> None:
    x_ND = torch.cat([torch.randn(200, 3), torch.randn(5, 3) + 100])
    centres_KD = kmeans(x_ND, 20, seed=1)
    assert len(torch.cdist(x_ND, centres_KD).argmin(1).unique()) == 20
    assert torch.equal(centres_KD, kmeans(x_ND, 20, seed=1))
    assert kmeans(x_ND[:3], 5, seed=0).shape == (5, 3)


def test_delta_of_a_ramp_is_its_slope() -> None:
    ramp = torch.arange(10.0)[None, :, None] * 3
    slope = delta(ramp, torch.tensor([8]))
    torch.testing.assert_close(slope[0, 2:6, 0], torch.full((4,), 3.0))
