"""Properties of the building blocks of models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.interfaces.frames import StepContext
from pretrain.nn.numerics import masked_deviation, scale_gradient
from pretrain.nn.spectral import LogMel
from pretrain.objectives.data2vec2 import CopiesPlan
from pretrain.self_supervision.contrastive import chance_levels, contrastive_loss
from pretrain.self_supervision.masking import adjusted_block_mask, block_mask, draw_negatives, pack_masks, span_mask
from pretrain.self_supervision.quantizers import GumbelQuantizer, nearest_codes, perplexity
from tests.support.contract_cases import batch, make


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, 400), prob=st.floats(0.01, 1.0), span=st.integers(1, 20), seed=st.integers(0, 99))
def test_span_mask(length: int, prob: float, span: int, seed: int) -> None:
    mask = span_mask(length, prob, span, np.random.default_rng(seed))
    assert mask.shape == (length,)
    assert mask.sum() <= max(span * (prob * length / span + 1), 2 * span)
    if length > 1:
        assert mask.sum() > 0
    assert mask.sum() < length or length == 0
    if length > span and mask.sum() < length - 1:  # where all but one frame is masked, that frame may divide a span
        runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        assert all(stop - start >= span for start, stop in runs.reshape(-1, 2))


def test_span_mask_covers_the_same_share_as_fairseq() -> None:
    """With p = 0.65 and L = 10, about 49 % of the frames are masked (wav2vec 2.0, §4.2)."""
    share = np.mean([span_mask(750, 0.65, 10, np.random.default_rng(seed)).mean() for seed in range(200)])
    assert share == pytest.approx(0.48, abs=0.015)


def test_block_mask_covers_the_configured_share() -> None:
    share = np.mean([block_mask(375, 0.6, 4, np.random.default_rng(seed)).mean() for seed in range(200)])
    assert share == pytest.approx(0.6, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 400), prob=st.floats(0.05, 0.95), seed=st.integers(0, 99), inverse=st.booleans())
def test_adjusted_block_mask_masks_exactly_the_configured_share(
    length: int, prob: float, seed: int, inverse: bool
) -> None:
    mask = adjusted_block_mask(length, prob, 0.05, 5, np.random.default_rng(seed), inverse)
    share, chosen = (1 - prob, ~mask) if inverse else (prob, mask)
    assert chosen.sum() == min(max(int(share * length), 1), length - 1)


def mean_run(mask: np.ndarray) -> float:
    """Returns the mean length of runs of True."""
    return float(mask.sum() / (np.diff(mask.astype(int), prepend=0) == 1).sum())


def test_data2vec2_masks_blocks_or_with_inverse_mask_keeps_blocks() -> None:
    """A third of the frames is covered, so that blocks seldom touch."""
    for inverse in (False, True):
        prob = 2 / 3 if inverse else 1 / 3
        masks = [adjusted_block_mask(400, prob, 0.05, 5, np.random.default_rng(s), inverse) for s in range(50)]
        masked, kept = (float(np.mean([mean_run(m) for m in side])) for side in (masks, [~m for m in masks]))
        blocks, rest = (kept, masked) if inverse else (masked, kept)
        assert 3.5 < blocks < 8
        assert rest > 1.3 * blocks


def test_data2vec2_masks_blocks_by_default() -> None:
    runs = []
    for options in ({}, {"mask_inverse": True}):
        module = make("data2vec2", mask_block=5, mask_prob=1 / 3, masks=8, **options)
        plan = module.objective.prepare(module.model, batch((16.0,)), StepContext(0, 0))
        assert isinstance(plan, CopiesPlan)
        runs.append(float(np.mean([mean_run(mask_F.numpy()) for mask_F in plan.mask_RF])))
    assert runs[0] > 3.5
    assert runs[1] < 3.0


def test_negatives_are_other_masked_frames_of_the_same_utterance() -> None:
    """Pitfall: negatives drawn from unmasked frames as well (HF#14471)."""
    rng = np.random.default_rng(0)
    mask = pack_masks([span_mask(50, 0.5, 5, rng), span_mask(30, 0.5, 5, rng)], 50, torch.device("cpu"))
    drawn_BMK = draw_negatives(mask, ("a", "b"), StepContext(0, 0), 2000)
    for row, count in enumerate(mask.counts_B.tolist()):
        for position in range(count):
            others = set(range(count)) - {position}
            assert set(drawn_BMK[row, position].tolist()) == others
    assert torch.equal(mask.mask_BF.flatten().nonzero()[:, 0], mask.flat_N)
    assert torch.equal(mask.row_BM[mask.valid_BM], torch.arange(len(mask.flat_N)))


def test_stem_gradient_scale_is_not_applied_to_the_accumulated_gradient() -> None:
    """Pitfall: scaling the accumulated gradient at each micro-step scales the first micro-batches repeatedly."""
    weight = torch.ones(3, requires_grad=True)
    for _ in range(3):
        scale_gradient(weight, 0.1).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 0.3))


def test_chance_level_and_ties() -> None:
    """Pitfall: the loss at chance level is ln(101), and ties must not count as correct."""
    loss, hits = contrastive_loss(torch.zeros(2, 5, 101), torch.ones(2, 5, dtype=torch.bool))
    assert float(loss) / 10 == pytest.approx(math.log(101), abs=1e-5)
    assert float(hits) == 0


def test_chance_levels_count_the_negatives_that_a_frame_has() -> None:
    """With three masked frames each has two possible negatives, however many are drawn with repetition."""
    negatives_BMK = torch.tensor([[[1, 2] * 50, [0, 2] * 50, [0, 1] * 50]])
    valid_BM = torch.ones(1, 3, dtype=torch.bool)
    loss, probability = chance_levels(torch.zeros(1, 3, 101), negatives_BMK, valid_BM)
    assert float(probability) / 3 == pytest.approx(1 / 3)
    assert float(loss) / 3 == pytest.approx(math.log(101))
    logits_BMK = torch.zeros(1, 3, 101).masked_fill(torch.cat([torch.zeros(1, 3, 1), negatives_BMK], 2) == 2, -math.inf)
    assert float(chance_levels(logits_BMK, negatives_BMK, valid_BM)[1]) == pytest.approx(1 / 2 + 1 / 2 + 1 / 3)


def test_gradients_pass_through_the_quantizer() -> None:
    """Pitfall: a detached quantizer trains neither its codes nor its logits."""
    quantizer = GumbelQuantizer(8, 6, groups=2, n_codes=5)
    x_ND = torch.randn(7, 8, requires_grad=True)
    quantizer(x_ND, 2.0).codes_ND.square().sum().backward()
    for tensor in (x_ND, quantizer.codebook_GVC, quantizer.logits.weight):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_quantizer_outputs_are_codebook_entries() -> None:
    quantizer = GumbelQuantizer(8, 6, groups=2, n_codes=5)
    for training in (True, False):
        found = quantizer.train(training)(torch.randn(7, 8), 1.0)
        for group in range(2):
            chosen = quantizer.codebook_GVC[group, found.index_NG[:, group]]
            torch.testing.assert_close(found.codes_ND[:, 3 * group : 3 * group + 3], chosen)


def test_perplexity_limits() -> None:
    assert float(perplexity(torch.full((4, 2, 10), 0.1))) == pytest.approx(20)
    one_hot = torch.zeros(4, 2, 10, requires_grad=True)
    spiked = one_hot + torch.eye(10)[0]
    value = perplexity(spiked)
    value.backward()
    assert float(value.detach()) == pytest.approx(2)
    assert one_hot.grad is not None
    assert torch.isfinite(one_hot.grad).all()


def test_nearest_codes_stay_exact_under_autocast_and_chunks() -> None:
    """Pitfall: distances in bf16 or TF32 select wrong codes."""
    x_ND, codes_KD = torch.randn(301, 16), torch.randn(97, 16)
    exact = torch.cdist(x_ND.double(), codes_KD.double()).argmin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(x_ND, codes_KD, chunk=50), exact)


def test_log_mel_is_normalised_and_ignores_padding() -> None:
    wave_BT = torch.zeros(2, 20_000)
    wave_BT[0], wave_BT[1, :9_000] = torch.randn(20_000), torch.randn(9_000)
    frames = LogMel()(wave_BT, torch.tensor([20_000, 9_000]))
    assert frames.lengths_B.tolist() == [(20_000 - 400) // 160 + 1, (9_000 - 400) // 160 + 1]
    alone = LogMel()(wave_BT[1:, :9_000], torch.tensor([9_000])).x_BFD[0]
    torch.testing.assert_close(frames.x_BFD[1, : len(alone)], alone)
    assert frames.x_BFD[1, len(alone) :].abs().max() == 0
    assert alone.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(alone.std(0, correction=0), torch.ones(80), rtol=0.01, atol=0.01)


def test_masked_deviation_uses_the_masked_frames_only() -> None:
    x_BFD = torch.randn(3, 20, 8) * 2 + 5
    mask_BF = torch.rand(3, 20) < 0.5
    expected = x_BFD[mask_BF].std(0, correction=0).mean()
    torch.testing.assert_close(masked_deviation(x_BFD, mask_BF), expected)


def test_a_collapsed_stem_is_visible_although_targets_look_healthy() -> None:
    """Pitfall: data2vec's variance guard checks targets and predictions, and misses a dead stem (fairseq#5239)."""
    module = make("data2vec", "waveform_conv")
    ctx = StepContext(0, 0)

    def stem_deviation() -> float:
        plan = module.prepare(batch(), ctx)
        return float(module(batch(), plan, plan.counts_K, ctx)[1]["health/std_stem"][0])

    healthy = stem_deviation()
    with torch.no_grad():
        module.model.frontend.get_submodule("convs.6.conv").weight.zero_()
    assert stem_deviation() < 1e-4 * healthy


def test_the_diversity_loss_is_weighted_by_the_number_of_targets() -> None:
    """Pitfall: adding it unweighted, as in HF#14471."""
    module = make("wav2vec2").eval()
    plan = module.prepare(batch(), StepContext(0, 0))
    _, metrics = module(batch(), plan, plan.counts_K, StepContext(0, 0))
    total = metrics["loss/objective"][0] - metrics["loss/contrastive"][0]
    n_codes, count = 2 * 32, plan.counts_K[0]
    perplexity_ = metrics["metric/soft_perplexity"][0] / count
    torch.testing.assert_close(total.double(), 0.1 * (n_codes - perplexity_) / n_codes * count, rtol=1e-3, atol=1e-3)
