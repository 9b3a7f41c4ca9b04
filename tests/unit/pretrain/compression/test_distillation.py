"""Distillation and pruning: NumPy twins of losses and gates, the teacher by path, and a pruned run that is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.schema import ConfigError, load
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import MODEL, LoadedCheckpoint, load_checkpoint
from pretrain.compression.cut import cut_blocks, cut_gates, cut_pruned, cut_widths
from pretrain.compression.distillation import load_teacher
from pretrain.config import Config
from pretrain.interfaces.frames import EncoderOutput, ModelGates, StepContext
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.gates import FASTER, HardConcreteGates, open_probability
from pretrain.objectives.distil import Distil
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import batch, small
from tests.support.parity_table import Parity
from tests.support.training import config as training_config
from tests.support.training import run, save

CTX = StepContext(seed=3, step=5)


def module_of(encoder: str = "transformer", **objective: Any) -> TrainModule:
    values = {"data": {"shards": "none"}, "frontend": {"name": "log_mel"}, "encoder": small("encoders", encoder)}
    return build_model(load(Config, values | {"objective": {"name": "distil"} | objective}))


def test_the_loss_equals_its_twin_in_numpy(parity: Parity) -> None:
    """Per frame and layer: mean |p − t| + 1 − cos(p, t), in fp64."""
    objective = module_of(layers=[[0], [1, 2]], mask_prob=0.0).objective.double()
    assert isinstance(objective, Distil)
    rng = np.random.default_rng(0)
    own, theirs = rng.standard_normal((3, 2, 5, 32)), rng.standard_normal((3, 2, 5, 32))
    flat_N = torch.tensor([0, 1, 4, 7])
    encoded = EncoderOutput(tuple(map(torch.from_numpy, own)), torch.tensor([5, 5]), 25.0)
    total, _ = objective.compare(encoded, tuple(map(torch.from_numpy, theirs)), flat_N)
    expected = 0.0
    for group, layer in ((0, 0), (1, 1), (1, 2)):
        projection: Any = objective.projections[group]
        weight, bias = (part.detach().numpy() for part in (projection.weight, projection.bias))
        p = own[layer].reshape(10, 32)[flat_N] @ weight.T + bias
        t = theirs[layer].reshape(10, 32)[flat_N]
        cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
        expected += float((np.abs(p - t).mean(1) + 1 - cosine).sum()) / 3
    parity("distillation loss = NumPy in double precision (relative)", 1e-6, abs(float(total) - expected) / expected)


def gates_of(encoder: str = "transformer") -> HardConcreteGates:
    model = module_of(encoder).model
    assert isinstance(model.encoder, BlockStack)
    return HardConcreteGates(model.frontend, model.encoder).double()


def parts_of(gates: ModelGates) -> list[Tensor]:
    return [*gates.frontend, *(part for block in gates.blocks for part in (block.heads_H, block.channels[0]))]


@pytest.mark.parametrize("encoder", ["transformer", "conformer"])
def test_gates_penalty_and_gradients_equal_their_twin_in_numpy(encoder: str, parity: Parity) -> None:
    gates = gates_of(encoder)
    rng = np.random.default_rng(1)
    theta, multipliers = rng.normal(0, 0.02, len(gates.theta_N)), np.array([0.01, 0.03])
    with torch.no_grad():
        gates.theta_N.copy_(torch.from_numpy(theta))
        gates.multipliers_2.copy_(torch.from_numpy(multipliers))
    torch.manual_seed(4)
    found = gates.train()(0.6)
    found.penalty.backward()
    torch.manual_seed(4)
    u = torch.rand(len(theta))
    u = u.double().clamp(1e-6, 1 - 1e-6).numpy()
    log_alpha, sigmoid = 100 * theta, lambda x: 1 / (1 + np.exp(-x))
    s = sigmoid((np.log(u) - np.log(1 - u) + log_alpha) * 1.5)
    z = np.clip(s * 1.2 - 0.1, 0, 1)
    assert all(part is block.channels[0] for block in found.gates.blocks for part in block.channels)
    given = np.concatenate([part.detach().numpy() for part in parts_of(found.gates)])
    parity("hard-concrete gates = NumPy in double precision", 1e-6, float(np.abs(given - z).max()))
    assert 0.05 < (z == 0).mean() < 0.95
    probability = sigmoid(log_alpha - 2 / 3 * np.log(0.1 / 1.1))
    block = np.array([16 * (4 * 32 + 3)] * 2 + [65 * (2 if encoder == "conformer" else 1)] * 64)
    first, second = probability[:32], probability[32:64]  # of 80 bands, two convolutions of 3 taps and a linear layer
    alone = np.concatenate([np.full(32, 80 * 3 + 1), np.full(32, 1 + 2 + 32), np.tile(block, 2)])
    between, total = 32 * 32 * 3, alone.sum() + 32 * 32 * 3
    sparsity = 1 - ((probability * alone).sum() + between * first.mean() * second.mean()) / total
    off = sparsity - 0.6
    penalty = 0.1 * off + 3.0 * off**2
    errors = [abs(float(found.sparsity) - sparsity), abs(float(found.penalty) - penalty)]
    parity("expected sparsity and its penalty = NumPy in double precision", 1e-6, max(errors))
    alone = alone.astype(float)
    alone[:32] += between / 32 * second.mean()
    alone[32:64] += between / 32 * first.mean()
    slope = -probability * (1 - probability) * alone / total * (0.1 + 6.0 * off) * 100
    assert gates.theta_N.grad is not None
    assert gates.multipliers_2.grad is not None
    np.testing.assert_allclose(gates.theta_N.grad.numpy(), slope, atol=1e-7)
    np.testing.assert_allclose(gates.multipliers_2.grad.numpy(), [-10 * off, -100 * off**2], atol=1e-6)


def test_gates_close_as_many_as_expected_and_are_open_at_first() -> None:
    gates = gates_of()
    assert float(gates.train()(0.0).sparsity) == pytest.approx(0.01 / 12, abs=0.012)
    with torch.no_grad():
        gates.theta_N.copy_(torch.linspace(-0.1, 0.1, len(gates.theta_N)))
        closed_N = gates.closed(FASTER * gates.theta_N)
    expected = float((1 - open_probability(FASTER * gates.theta_N)).sum())
    assert abs(float((closed_N == 0).sum()) - expected) <= 2
    assert float(closed_N.max()) == 1.0


def test_a_pruned_model_is_cut_to_what_its_gates_left() -> None:
    module = module_of(sparsity=0.5, mask_prob=0.0).eval()
    objective = module.objective
    assert isinstance(objective, Distil)
    assert objective.gates is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        objective.gates.theta_N.copy_(0.06 * torch.randn(len(objective.gates.theta_N), generator=generator))
    pruning = objective.pruning()
    assert pruning is not None
    config = load(Config, {"data": {"shards": "none"}, "frontend": {"name": "log_mel"},
        "encoder": small("encoders", "transformer"),
        "objective": {"name": "distil", "sparsity": pruning.found, "mask_prob": 0.0}})  # fmt: skip
    object.__setattr__(objective, "config", dataclasses.replace(objective.config, sparsity=pruning.found))
    cut = cut_pruned(LoadedCheckpoint(module, config, 3))
    assert cut.config.objective.sparsity == 0.0  # type: ignore[attr-defined]
    assert all(1 <= width < 32 for width in cut.config.frontend.widths)  # type: ignore[attr-defined]
    data = batch()
    with torch.no_grad():
        front = pruning.gates.frontend
        frames = module.model.project(module.model.extract(data.wave_BT, data.lengths_B, front), front)
        gated = module.model.encoder(frames, None, pruning.gates.blocks)
        small_one = cut.module.model.eval()(data.wave_BT, data.lengths_B)
    for one, other in zip(small_one.layers, gated.layers, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=2e-6)
    object.__setattr__(objective, "config", dataclasses.replace(objective.config, sparsity=pruning.found + 0.03))
    with pytest.raises(ConfigError, match=r"was requested, but the closed gates remove .*train longer"):
        cut_pruned(LoadedCheckpoint(module, config, 3))


@pytest.mark.parametrize("frontend", [False, True])
def test_pruning_reaches_the_sparsity_that_was_asked_and_stays_there(frontend: bool) -> None:
    module = module_of(sparsity=0.5, sparsity_steps=20, mask_prob=0.0, prune_frontend=frontend)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-3)
    data = batch((0.6,))
    shares = []
    for step in range(150):
        torch.manual_seed(step)
        plan = module.prepare(data, StepContext(3, step))
        loss, metrics = module(data, plan, plan.counts_K, StepContext(3, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(float(metrics["metric/sparsity"][0] / metrics["metric/sparsity"][1]))
    pruning = module.objective.pruning()
    assert pruning is not None
    assert pruning.found == pytest.approx(0.5, abs=0.03)
    assert shares[-1] == pytest.approx(0.5, abs=0.01)
    assert max(shares) < 0.7, "much more is never removed on the way, which training would have to undo"


@pytest.mark.parametrize("encoder", ["transformer", "conformer"])
@pytest.mark.parametrize("closed", ["some", "whole parts"])
def test_the_share_that_gates_remove_is_the_share_that_a_cut_removes(encoder: str, closed: str) -> None:
    module = module_of(encoder, sparsity=0.5).eval()
    objective = module.objective
    assert isinstance(objective, Distil)
    assert objective.gates is not None
    with torch.no_grad():
        theta_N = objective.gates.theta_N
        theta_N.copy_(0.1 * torch.randn(len(theta_N), generator=torch.Generator().manual_seed(5)))
        if closed == "whole parts":
            for part_K in torch.split(theta_N, objective.gates.sizes)[1::2]:
                part_K.fill_(-1.0)
    pruning = objective.pruning()
    assert pruning is not None
    config = load(Config, {"data": {"shards": "none"}, "frontend": {"name": "log_mel"},
        "encoder": small("encoders", encoder), "objective": {"name": "distil", "sparsity": 0.5}})  # fmt: skip
    found = LoadedCheckpoint(module, config, 3)
    cut = cut_gates(found, pruning.gates)
    before, after = (sum(w.numel() for w in m.model.parameters()) for m in (module, cut.module))
    prunable = sum(weights.number for weights in objective.gates.weights)
    assert (before - after) / prunable == pytest.approx(pruning.found, abs=1e-6)
    with pytest.raises(ConfigError, match="--blocks 1: this run has gates of structured pruning"):
        cut_blocks(found, 1)
    with pytest.raises(ConfigError, match="--widths: this run has gates of structured pruning"):
        cut_widths(found, [[1, 8]] * 2)


def test_the_front_end_keeps_its_channels_where_it_is_asked_to() -> None:
    objective = module_of(sparsity=0.5, prune_frontend=False).objective
    assert isinstance(objective, Distil)
    assert objective.gates is not None
    assert objective.gates(0.1).gates.frontend == ()
    pruning = objective.pruning()
    assert pruning is not None
    assert (pruning.gates.frontend, len(pruning.gates.blocks)) == ((), 2)


def student(teacher: Path | str, **objective: Any) -> Config:
    encoder = {"name": "transformer", "layers": 1, "dim": 32, "heads": 2, "ffn_dim": 64}
    fields = {"name": "distil", "teacher": str(teacher), "mask_prob": 0.0} | objective
    return training_config(steps=3, encoder=encoder, objective=fields)


def test_a_teacher_is_loaded_from_its_run_and_never_saved(tmp_path: Path) -> None:
    save(tmp_path / "teacher", 2, seed=5)
    config = student(tmp_path / "teacher", layers=[[0], [2]])
    module = build_model(config).eval()
    with pytest.raises(ConfigError, match="was not loaded"):
        module.prepare(batch(), CTX)
    load_teacher(config, module.objective)
    plan = module.prepare(batch(), CTX)
    loss, _ = module(batch(), plan, plan.counts_K, CTX)
    loss.backward()
    assert float(loss) > 0.5
    names = list(module.state_dict())
    assert [name for name in names if "teacher" in name] == ["objective.teacher_sha256"]
    checkpoint = find_checkpoint(str(tmp_path / "teacher"))
    same = build_model(config).eval()
    same.objective.take_teacher(load_checkpoint(checkpoint).module.model, sha256_of(checkpoint / MODEL))
    assert torch.equal(same(batch(), plan, plan.counts_K, CTX)[0], loss)
    assert torch.equal(same.get_buffer("objective.teacher_sha256"), module.get_buffer("objective.teacher_sha256"))
    save(tmp_path / "other", 2, seed=6)
    load_teacher(
        student(tmp_path / "other", layers=[[0], [2]]),
        (other := build_model(student(tmp_path / "other", layers=[[0], [2]]))).objective,
    )
    other.load_state_dict(module.state_dict())  # as a resume does
    with pytest.raises(ConfigError, match=r"and this run began with .*; give the same checkpoint"):
        other.prepare(batch(), CTX)


@pytest.mark.parametrize(
    ("teacher", "objective", "words"),
    [
        ({"frontend": {"name": "log_mel", "subsampling": 2}}, {}, "has 50 frames per second and the student 25"),
        ({"encoder": {"name": "transformer", "layers": 1, "dim": 64, "heads": 2, "ffn_dim": 32}}, {}, "teacher_dim=64"),
        ({}, {"layers": [[0], [3]]}, r"objective.layers=\[\[0\], \[3\]\]: .* has the layers 0 to 2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    teacher: dict[str, Any], objective: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save(tmp_path / "teacher", 2, **teacher)
    config = student(tmp_path / "teacher", **objective)
    with pytest.raises(ConfigError, match=words):
        load_teacher(config, build_model(config).objective)


def test_another_width_of_a_teacher_without_a_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective.teacher_dim=64: without objective.teacher .* encoder.dim=32"):
        module_of(teacher_dim=64)


def test_a_student_trains_and_resumes_with_its_own_first_weights_as_the_teacher(tmp_path: Path) -> None:
    config = training_config(
        steps=4, objective={"name": "distil", "sparsity": 0.3, "sparsity_steps": 2, "layers": [[1], [2]]}
    )
    run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, stop_after=2)
    run(tmp_path / "parts", config)
    one, two = (load_checkpoint(find_checkpoint(str(tmp_path / name))).module for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
