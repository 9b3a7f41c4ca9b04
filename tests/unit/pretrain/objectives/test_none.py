"""Training by heads alone: what is hidden, what is frozen, and what the run reports."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.frames import Frames, StepContext
from pretrain.monitoring.health_monitor import UnhealthyError
from pretrain.train_module import build_model
from tests.support.contract_cases import speech_like
from tests.support.training import config, run

HEAD = {"text": {"name": "ctc", "symbols": "ab"}}


def settings(steps: int = 6, **objective: Any) -> Any:
    return config(
        steps, objective={"name": "none", **objective}, heads=HEAD, optimizer={"lr": 1e-2, "weight_decay": 0.0}
    )


def batch(rows: int = 3, first: int = 0) -> Batch:
    lengths = [16_000, 12_000, 9_000, 14_000][first : first + rows]
    wave_BT = torch.zeros(rows, max(lengths))
    for row, length in enumerate(lengths):
        wave_BT[row, :length] = speech_like(1.0, first + row)[:length]
    keys = tuple(f"key-{first + row}" for row in range(rows))
    texts = ("ab", "ba", "a", "bb")[first : first + rows]
    return Batch(wave_BT, torch.tensor(lengths), keys, 0, labels={"text": texts})


def test_what_is_hidden_belongs_to_the_segment_and_the_step() -> None:
    module = build_model(settings(mask_time=0.3, mask_channels=0.3))
    plan: Any = module.prepare(batch(), StepContext(0, 3)).plan
    later: Any = module.prepare(batch(), StepContext(0, 4)).plan
    beside: Any = module.prepare(batch(2, first=1), StepContext(0, 3)).plan
    assert not torch.equal(plan.hidden_BF, later.hidden_BF)
    assert torch.equal(plan.hidden_BF[1:, : beside.hidden_BF.shape[1]], beside.hidden_BF)
    assert torch.equal(plan.hidden_BC[1:], beside.hidden_BC)
    frames_B = module.model.frontend.feature_lengths(batch().lengths_B)
    share_B = plan.hidden_BF.sum(1) / frames_B
    assert 0.1 < float(share_B.min()) < float(share_B.max()) < 0.4
    assert not plan.hidden_BF[2, int(frames_B[2]) :].any()


def test_hidden_features_are_zero_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_model(settings(mask_time=0.3, mask_channels=0.1)).eval()
    seen, project = [], module.model.frontend.project

    def recorded(features: Frames, gates: tuple[Tensor, ...]) -> Frames:
        seen.append(features.x_BFD)
        return project(features, gates)

    monkeypatch.setattr(module.model.frontend, "project", recorded)
    ctx = StepContext(0, 0)
    plan: Any = module.prepare(batch(), ctx)
    module(batch(), plan, plan.counts_K, ctx)
    plain_BFD = module.model.extract(batch().wave_BT, batch().lengths_B).x_BFD
    hidden_BFD = plan.plan.hidden_BF[:, :, None] | plan.plan.hidden_BC[:, None]
    assert torch.equal(seen[0], plain_BFD.masked_fill(hidden_BFD, 0.0))
    assert bool((seen[0] != plain_BFD).any())


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_weights_keep_their_bits_and_learn_afterwards(frozen: int) -> None:
    torch.set_num_threads(1)
    wanted = settings(frozen_steps=frozen)
    engine = make_engine(wanted, build_model(wanted), DistributedContext())
    states = [{name: weight.clone() for name, weight in engine.module.state_dict().items()}]
    for step in range(4):
        engine.step([batch()], StepContext(0, step), lr=1e-2)
        states.append({name: weight.clone() for name, weight in engine.module.state_dict().items()})
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == ({"heads"} if step < frozen else {"heads", "model"}), step


def test_only_a_head_without_targets_is_reported(tmp_path: Path) -> None:
    """The synthetic audio has no text; the objective never has a target, which is not reported."""
    with pytest.raises(UnhealthyError, match="the task 'text' had no target"):
        run(tmp_path, settings(8))


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no loss; add a head"):
        config(objective={"name": "none"})
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay"):
        config(objective={"name": "none", "frozen_steps": 1}, heads=HEAD)
    assert "never learns" in settings(6, frozen_steps=6).cautions()[-1]
