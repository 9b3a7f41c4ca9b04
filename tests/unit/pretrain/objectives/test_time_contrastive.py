"""The time-contrastive objective: alignment of its two views, and excluded negatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipeline.audio.transforms import change_speed_on_device
from pretrain.interfaces.frames import StepContext
from pretrain.objectives.time_contrastive import TimeContrastive, ViewsPlan, partners
from pretrain.self_supervision.contrastive import contrast_logits, contrastive_loss
from pretrain.self_supervision.masking import pack_masks
from pretrain.self_supervision.time_warp import Warp, draw_warp, warped
from tests.support.contract_cases import batch, make


def test_a_faster_tone_is_higher_and_shorter() -> None:
    tone = torch.sin(2 * math.pi * 400 * torch.arange(16_000) / 16_000)
    faster = change_speed_on_device(tone, 1.25)
    assert len(faster) == 12_800
    expected = torch.sin(2 * math.pi * 500 * torch.arange(12_800) / 16_000)
    torch.testing.assert_close(faster, expected, rtol=0, atol=1e-3)


def test_partners_are_monotone_and_at_the_same_time_in_both_views() -> None:
    lengths = torch.tensor([100, 40, 80, 50])  # the second view is 1.25 and 0.8 times as fast
    warps = [Warp(np.array([0, 32_000]), np.array([0, 25_600])), Warp(np.array([0, 12_800]), np.array([0, 16_000]))]
    found = partners(lengths, warps, 100, 320.0)
    for row, (speed, other) in enumerate(((1.25, 2), (0.8, 3), (1 / 1.25, 0), (1 / 0.8, 1))):
        at = found[row, : int(lengths[row])] - other * 100
        assert (at.diff() >= 0).all()
        assert int(at.max()) < int(lengths[other])
        instant = (torch.arange(int(lengths[row])) + 0.5) / speed
        assert ((at + 0.5) - instant).abs().max() <= 0.5 + 1e-4


def test_each_segment_has_its_own_speed_and_pitch() -> None:
    warp = draw_warp(np.random.default_rng(1), 48_000, 0.7, 1.4, segment_seconds=1.0)
    assert len(warp.original) == 4
    speeds = np.diff(warp.original) / np.diff(warp.view)
    assert len(set(speeds)) == 3
    assert (speeds >= 0.699).all()
    assert (speeds <= 1.401).all()
    tone = torch.sin(2 * math.pi * 400 * torch.arange(48_000) / 16_000)
    view = warped(tone, warp)
    assert len(view) == warp.view[-1]
    for speed, begin, end in zip(speeds, warp.view, warp.view[1:], strict=False):
        middle = view[begin + 400 : end - 400]
        expected = 2 * 400 * speed * len(middle) / 16_000
        assert int((middle[1:] * middle[:-1] < 0).sum()) == pytest.approx(expected, abs=2), "zero crossings of the tone"
    assert float((view[1:] - view[:-1]).abs().max()) < 2.5 * 2 * math.pi * 400 * 1.4 / 16_000, "no clicks at the joints"
    instants = np.arange(0, 48_000, 777)
    assert np.abs(warp.to_original(warp.to_view(instants)) - instants).max() < 1e-6


def test_one_speed_for_an_utterance_is_that_of_the_whole_resampled() -> None:
    wave = torch.randn(16_000)
    warp = draw_warp(np.random.default_rng(1), 16_000, 0.8, 1.25, segment_seconds=0.0)
    speed = float(np.random.default_rng(1).uniform(0.8, 1.25))
    assert torch.equal(warped(wave, warp), change_speed_on_device(wave, speed))


@pytest.mark.parametrize("segment_seconds", [0.0, 0.3])
def test_a_frame_and_its_partner_contain_the_same_sound(segment_seconds: float) -> None:
    """An impulse is in a frame of one view and in that frame's partner in the other view."""
    more = {"slowest": 0.8, "fastest": 1.0, "segment_seconds": segment_seconds}
    module = make("time_contrastive", frontend="log_mel", **more).eval()
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
