"""The objective documented in the six steps of CONTRIBUTING.md is a working plug-in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pretrain.objectives
from data_pipeline.core import plugins
from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from launch import main
from pretrain import registry
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import FRONTENDS, batch, small
from tests.support.documents import listing
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards

CTX = StepContext(seed=3, step=5)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainModule]:
    """Builds a tiny model with the documented objective."""
    (tmp_path / "masked_mel.py").write_text(listing(ROOT / "CONTRIBUTING.md", "Add an objective in six steps"))
    monkeypatch.setattr(pretrain.objectives, "__path__", [*pretrain.objectives.__path__, str(tmp_path)])
    assert "masked_mel" in registry.names("objectives")
    values = {
        "data": {"shards": "none"},
        "objective": {"name": "masked_mel"},
        "frontend": FRONTENDS["waveform_conv"],
        "encoder": small("encoders", "transformer"),
        "engine": {"precision": "fp32"},
    }
    yield build_model(load(Config, values))
    del sys.modules["pretrain.objectives.masked_mel"]


def run(module: TrainModule, batch: Batch) -> tuple[Tensor, dict[str, Sum]]:
    plan = module.prepare(batch, CTX)
    out: tuple[Tensor, dict[str, Sum]] = module(batch, plan, plan.counts_K, CTX)
    return out


def test_the_documented_objective_trains(module: TrainModule) -> None:
    module.eval()  # no dropout, so that losses can be compared
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 5e-3)
    losses = []
    for _ in range(6):
        loss, _ = run(module, batch())
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in module.model.frontend.parameters() if p.requires_grad]
        assert gradients
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


def test_the_documented_objective_satisfies_the_contract(module: TrainModule) -> None:
    module.eval()
    tight, metrics = run(module, batch())
    loose, _ = run(module, batch(width=1.5))
    torch.testing.assert_close(loose, tight, rtol=2e-5, atol=1e-6)
    total, count = metrics["loss/objective"]
    torch.testing.assert_close(total / count, tight.double(), rtol=1e-6, atol=0, check_dtype=False)
    module.objective.record_next()
    run(module, batch())
    record = module.objective.monitoring()
    assert {record.loss, record.target_deviation, record.prediction_deviation} <= metrics.keys()
    assert record.last is not None
    assert record.last.targets_ND is not None
    assert len(record.last.targets_ND) == int(record.last.mask_BF.sum()) == int(count)


def test_the_documented_objective_is_trained_from_a_folder_outside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks train it, and resume it; without `plugins=` the run is refused and no code of its folder runs."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    folder = tmp_path / "own"
    (folder / "objectives").mkdir(parents=True)
    (folder / "objectives" / "masked_mel.py").write_text(
        listing(ROOT / "CONTRIBUTING.md", "Add an objective in six steps")
    )
    shards = write_shards(tmp_path / "shards", [sounds([1.5] * 16)])
    sizes = ["encoder.dim=32", "encoder.layers=1", "encoder.ffn_dim=64", "encoder.heads=2", "frontend.channels=32"]
    data = [f"data.shards={shards}", "data.batch_seconds=8", "data.micro_batches=4", "data.min_seconds=0.5"]
    run = ["pretrain", "objective=masked_mel", "encoder=transformer_tiny", *sizes, *data, "data.max_seconds=2"]
    run += ["data.workers=0", f"runs={tmp_path}", "name=mel", "engine.name=torch", "device=cpu"]
    run += ["launcher.processes=2", "schedule.warmup_steps=1", "health.on_collapse=warn"]
    assert main.main([*run, "train.steps=2", f"plugins=[{folder}]"]) == 0
    described = json.loads((tmp_path / "mel" / "environment.json").read_text())
    assert [plugin["name"] for plugin in described["plugins"]] == ["masked_mel"]

    monkeypatch.setenv(plugins.VARIABLE, "")
    capfd.readouterr()
    assert main.main([*run, "train.steps=4"]) == 2
    assert "plugins=FOLDER" in capfd.readouterr().err
    assert main.main(["export", str(tmp_path / "mel"), str(tmp_path / "exported")]) != 0
    assert "plugins=FOLDER" in capfd.readouterr().err

    assert main.main([*run, "train.steps=4", f"plugins={folder}"]) == 0
    rows = read_rows(tmp_path / "mel" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss/objective"] > 0 for row in rows)
