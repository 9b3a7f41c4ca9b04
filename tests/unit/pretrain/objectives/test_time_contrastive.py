"""The time-contrastive objective: alignment of its two views, and excluded negatives."""

from __future__ import annotations

import math

import pytest
import torch

from data_pipeline.audio.transforms import change_speed_on_device
from pretrain.interfaces.frames import StepContext
from pretrain.objectives.time_contrastive import TimeContrastive, ViewsPlan, partners
from pretrain.self_supervision.contrastive import contrast_logits, contrastive_loss
from pretrain.self_supervision.masking import pack_masks
from tests.support.contract_cases import batch, make


def test_a_faster_tone_is_higher_and_shorter() -> None:
    tone = torch.sin(2 * math.pi * 400 * torch.arange(16_000) / 16_000)
    faster = change_speed_on_device(tone, 1.25)
    assert len(faster) == 12_800
    expected = torch.sin(2 * math.pi * 500 * torch.arange(12_800) / 16_000)
    torch.testing.assert_close(faster, expected, rtol=0, atol=1e-3)


def test_partners_are_monotone_and_at_the_same_time_in_both_views() -> None:
    lengths = torch.tensor([100, 40, 80, 50])  # the second view is 1.25 and 0.8 times as fast
    found = partners(lengths, torch.tensor([1.25, 0.8]), 100)
    for row, (speed, other) in enumerate(((1.25, 2), (0.8, 3), (1 / 1.25, 0), (1 / 0.8, 1))):
        at = found[row, : int(lengths[row])] - other * 100
        assert (at.diff() >= 0).all()
        assert int(at.max()) < int(lengths[other])
        instant = (torch.arange(int(lengths[row])) + 0.5) / speed
        assert ((at + 0.5) - instant).abs().max() <= 0.5 + 1e-4


def test_a_frame_and_its_partner_contain_the_same_sound() -> None:
    """An impulse is in a frame of one view and in that frame's partner in the other view."""
    module = make("time_contrastive", frontend="log_mel", slowest=0.8, fastest=1.0).eval()
    objective, model = module.objective, module.model
    data = batch((1.2,))
    data.wave_BT[:] = 0
    data.wave_BT[0, 11_000] = 1.0
    plan = objective.prepare(model, data, StepContext(3, 5))
    assert isinstance(plan, ViewsPlan)
    energy = [[float(wave[f * 640 : (f + 1) * 640].square().sum()) for f in range(28)] for wave in plan.views.wave_BT]
    loudest = [max(range(28), key=row.__getitem__) for row in energy]
    assert loudest[1] > loudest[0], "the second view is slower, so the impulse comes later"
    width = plan.partner_RF.shape[1]
    assert abs(int(plan.partner_RF[0, loudest[0]]) - width - loudest[1]) <= 1
    assert abs(int(plan.partner_RF[1, loudest[1]]) - loudest[0]) <= 1


def test_negatives_of_the_same_cluster_are_excluded() -> None:
    mask = pack_masks([torch.ones(4, dtype=torch.bool).numpy()], 4, torch.device("cpu"))
    others = torch.tensor([[[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]])
    vectors = torch.eye(4)
    logits = contrast_logits(vectors, vectors, torch.tensor([0, 0, 1, 2]), mask, others, 0.1)
    assert logits[0, :, 0].tolist() == pytest.approx([10.0] * 4)
    assert torch.isinf(logits[0, :, 1:]).tolist() == [[True, False, False]] * 2 + [[False] * 3] * 2
    everything_alike = contrast_logits(vectors, vectors, torch.zeros(4), mask, others, 0.1)
    assert float(contrastive_loss(everything_alike, mask.valid_BM)[0]) == 0, "without negatives the loss is 0"


def test_clusters_are_fitted_after_the_first_update_and_kept() -> None:
    module = make("time_contrastive", clusters=8)
    objective = module.objective
    assert isinstance(objective, TimeContrastive)
    fitted = []
    for step in range(3):
        ctx = StepContext(0, step)
        plan = module.prepare(batch(), ctx)
        _, metrics = module(batch(), plan, plan.counts_K, ctx)
        module.after_step(ctx)
        fitted.append(objective.centres_KD.clone())
    assert torch.equal(fitted[0], fitted[2])
    assert (metrics["hist/codes"][0] > 0).sum() >= 5
    assert "loss/temporal" in metrics
