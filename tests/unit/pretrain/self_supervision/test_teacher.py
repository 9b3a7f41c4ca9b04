"""EMA teachers, online codebooks, whitening and mixing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.objectives.data2vec import Data2Vec
from pretrain.objectives.data2vec2 import CopiesPlan, Data2Vec2
from pretrain.objectives.dinosr import DinoSR
from pretrain.objectives.wavlm import MixturePlan
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer
from pretrain.self_supervision.teacher import Teacher, annealed_decay, averaged_layers, deviation
from tests.support.contract_cases import batch, make


def test_a_teacher_follows_the_student_and_is_never_trained() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    teacher = Teacher(student)
    before = teacher.copy[0].weight.clone()  # type: ignore[index]
    with torch.no_grad():
        student[0].weight.add_(1.0)
        student[0].bias.add_(1.0)
    teacher.follow(student, 0.9, lambda name: name.endswith("weight"))
    torch.testing.assert_close(teacher.copy[0].weight, before + 0.1)  # type: ignore[index]
    torch.testing.assert_close(teacher.copy[0].bias, student[0].bias)  # type: ignore[index]
    assert not nn.ModuleList([teacher]).train()[0].training
    assert not any(weight.requires_grad for weight in teacher.parameters())


def test_ema_schedule() -> None:
    assert annealed_decay(0, 0.999, 0.9999, 30_000) == 0.999
    assert annealed_decay(15_000, 0.999, 0.9999, 30_000) == pytest.approx(0.99945)
    assert annealed_decay(90_000, 0.999, 0.9999, 30_000) == 0.9999


def test_data2vec_targets_ignore_the_mask_and_have_unit_scale() -> None:
    module = make("data2vec").eval()
    objective, model = module.objective, module.model
    assert isinstance(objective, Data2Vec)
    frames = model.frontend.project(model.frontend.extract(batch().wave_BT, batch().lengths_B))
    targets = objective.targets(frames)
    assert not targets.requires_grad
    length = int(frames.lengths_B[1])
    assert targets[1, :length].mean(0).abs().max() < 1e-4
    assert targets[1, length:].abs().max() == 0


@pytest.mark.parametrize("name", ["data2vec", "data2vec2"])
def test_the_regression_loss_is_averaged_over_masked_frames(name: str) -> None:
    """As released: the error summed over channels, divided by √D; a channel mean would vanish in Adam's ε."""
    module = make(name, frontend="waveform_conv").eval()
    objective = module.objective
    assert isinstance(objective, Data2Vec | Data2Vec2)
    last = objective.regression if isinstance(objective, Data2Vec) else objective.decoder.linear
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    data, model, ctx = batch(), module.model, StepContext(0, 0)
    plan = module.prepare(data, ctx)
    loss, metrics = module(data, plan, plan.counts_K, ctx)
    frames = model.frontend.project(model.frontend.extract(data.wave_BT, data.lengths_B))
    assert objective.teacher is not None
    targets_BFD = averaged_layers(objective.teacher.copy(frames), 8)
    if isinstance(plan.plan, CopiesPlan):
        mask_RF, targets_BFD = plan.plan.mask_RF, targets_BFD.repeat_interleave(objective.config.masks, dim=0)  # type: ignore[union-attr]
    else:
        mask_RF = plan.plan.mask.mask_BF
    expected = targets_BFD[mask_RF].square().sum(1).mean() / math.sqrt(32)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert metrics["metric/masked_share"][0] == mask_RF.sum()


@pytest.mark.parametrize("name", ["data2vec", "dinosr"])
def test_only_the_positional_convolution_of_a_teacher_is_copied_from_the_student(name: str) -> None:
    """fairseq's `ema_layers_only` excludes the positional convolution; the norm before the blocks is averaged."""
    module = make(name)
    teacher = dict(module.objective.teacher.copy.named_parameters())  # type: ignore[union-attr]
    student = dict(module.model.encoder.named_parameters())
    with torch.no_grad():
        for weight in student.values():
            weight.add_(1.0)
    ctx = StepContext(0, 0)
    plan = module.prepare(batch(), ctx)
    module(batch(), plan, plan.counts_K, ctx)
    module.after_step(ctx)
    copied = {part for part, weight in teacher.items() if torch.equal(weight, student[part])}
    assert copied == {part for part in teacher if part.startswith("positions.")} != set()


def test_initial_codes_have_the_scale_of_the_targets() -> None:
    objective = make("dinosr").objective
    assert isinstance(objective, DinoSR)
    torch.testing.assert_close(objective.sums_LVD.mean(1), torch.zeros(2, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(objective.sums_LVD.std(1, correction=0), torch.ones(2, 32), rtol=0, atol=1e-3)


def test_decoder_dropout_applies_to_the_decoder_input_only() -> None:
    """This is decoder.input_dropout of the release; nothing else in this model is random."""
    outcomes = {}
    for share in (0.0, 0.5):
        module = make("data2vec2", decoder_dropout=share).eval()
        assert isinstance(module.objective, Data2Vec2)
        module.objective.decoder_dropout.train()
        plan = module.prepare(batch(), StepContext(0, 0))
        first, second = (module(batch(), plan, plan.counts_K, StepContext(0, 0))[0] for _ in range(2))
        outcomes[share] = bool(torch.equal(first, second))
    assert outcomes == {0.0: True, 0.5: False}


def test_a_collapse_gives_a_deviation_of_zero() -> None:
    """Pitfall: a guard on the variance over channels misses identical frames."""
    assert float(deviation(torch.randn(1, 64).expand(100, 64))) == pytest.approx(0.0, abs=1e-6)
    assert float(deviation(torch.randn(1000, 64))) == pytest.approx(1.0, abs=0.05)


def test_dinosr_updates_only_codes_with_assigned_frames() -> None:
    module = make("dinosr")
    objective = module.objective
    assert isinstance(objective, DinoSR)
    sums, sizes = objective.sums_LVD.clone(), objective.sizes_LV.clone()
    ctx = StepContext(0, 0)
    plan = module.prepare(batch(), ctx)
    module(batch(), plan, plan.counts_K, ctx)
    new_sums, new_sizes = objective.new_sums_LVD.clone(), objective.new_sizes_LV.clone()
    assert int(new_sizes[0].sum()) == int(plan.plan.count) // objective.top_layers
    module.after_step(ctx)
    used = new_sizes > 0
    assert used.any()
    assert not used.all()
    torch.testing.assert_close(objective.sums_LVD[used], 0.9 * sums[used] + 0.1 * new_sums[used])
    torch.testing.assert_close(objective.sizes_LV[used], 0.9 * sizes[used] + 0.1 * new_sizes[used])
    assert torch.equal(objective.sums_LVD[~used], sums[~used])
    assert float(objective.new_sizes_LV.sum()) == 0


def test_whitening_makes_code_use_more_uniform() -> None:
    """Few directions carry most of the variance of log-mel; after whitening, random codes are used more evenly."""
    x_ND = torch.randn(4000, 40) * torch.logspace(1, -1, 40)
    quantizer = RandomProjectionQuantizer(40, 8, 256)

    def entropy() -> float:
        share = torch.bincount(quantizer(x_ND), minlength=256).float() / len(x_ND)
        return float(-torch.xlogy(share, share).sum()) / math.log(256)

    random = entropy()
    quantizer.whiten(x_ND)
    whitened = ((x_ND - quantizer.mean_D) @ quantizer.projection_DC).std(0)
    torch.testing.assert_close(whitened, torch.ones(8), rtol=1e-3, atol=1e-3)
    assert entropy() > max(random, 0.9)


def test_best_rq_fits_its_codes_after_the_first_update() -> None:
    module = make("best_rq", projection="pca", refine=True, codebooks=2)
    before = module.state_dict()
    before = {name: value.clone() for name, value in before.items() if "quantizers" in name}
    for step in range(2):
        ctx = StepContext(0, step)
        plan = module.prepare(batch(), ctx)
        loss, _ = module(batch(), plan, plan.counts_K, ctx)
        assert torch.isfinite(loss)
        module.after_step(ctx)
        now = module.state_dict()
        if step == 0:
            assert not any(torch.equal(now[name], value) for name, value in before.items())
            fitted = {name: now[name].clone() for name in before}
    assert all(torch.equal(now[name], value) for name, value in fitted.items())


def test_mixing_does_not_change_the_labels() -> None:
    clean, mixed = make("wavlm", mix_prob=0.0), make("wavlm", mix_prob=1.0)
    mixed.load_state_dict(clean.state_dict())
    ctx = StepContext(0, 4)
    histograms = []
    for module in (clean, mixed):
        plan = module.prepare(batch(), ctx)
        _, metrics = module(batch(), plan, plan.counts_K, ctx)
        histograms.append(metrics["hist/codes"][0])
    assert torch.equal(*histograms)


def test_a_batch_of_one_can_mix_with_itself() -> None:
    module = make("wavlm", mix_prob=1.0)
    data = batch((1.0,))
    plan = module.objective.prepare(module.model, Batch(data.wave_BT, data.lengths_B, data.keys, 0), StepContext(0, 1))
    assert isinstance(plan, MixturePlan)
    assert torch.isfinite(plan.mixed_BT).all()
