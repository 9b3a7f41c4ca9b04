"""Inner loops against closed forms, updates against those written out, ranks, resumes and refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import PART, SUPPORT, Batch, Cursor, Step
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.inner_loop import descend, step_shares
from pretrain.engines.meta import MetaEngine
from pretrain.heads.episode import prototypes
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.train import train
from pretrain.train_module import TrainModule, build_model
from tests.support.episodes import episode, settings
from tests.support.parity_table import Parity, difference

CTX = StepContext(0, 0)


def engine_of(config: Config) -> Engine:
    torch.set_num_threads(1)
    return make_engine(config, build_model(config), DistributedContext())


@pytest.mark.parametrize("second_order", [True, False])
def test_steps_on_a_quadratic_have_the_closed_form_and_its_gradients(second_order: bool, parity: Parity) -> None:
    """θ_S − a = Π (1 − α_i h) (θ − a), for the loss Σ h (θ − a)² / 2; first order leaves the product out of dθ."""
    draw = torch.Generator().manual_seed(0)
    h, a, b, start = (torch.rand(5, generator=draw, dtype=torch.float64) + 0.5 for _ in range(4))
    rates = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    start.requires_grad_()
    path = descend(
        {"w": start}, lambda w, step: (h * (w["w"] - a) ** 2).sum() / 2, lambda name, step: rates[step], 3, second_order
    )
    end = path.weights[-1]["w"]
    factors = torch.stack([1 - rate * h for rate in rates.detach()])
    order = "second order" if second_order else "first order"
    parity("steps on a quadratic, fp64: closed form", 1e-12, difference(end, a + factors.prod(0) * (start - a)))
    ((end - b) ** 2).sum().div(2).backward()
    outer = (end - b).detach()
    expected = outer * (factors.prod(0) if second_order else 1.0)
    assert start.grad is not None
    assert rates.grad is not None
    parity(f"gradient by the start of steps, {order}, fp64: closed form", 1e-12, difference(start.grad, expected))
    gap = (start - a).detach()
    for step in range(3):
        before, after = factors[:step].prod(0), factors[step + 1 :].prod(0)
        by_rate = -(outer * h * before * gap * (after if second_order else 1.0)).sum()
        error = difference(rates.grad[step], by_rate)
        parity(f"gradient by the rates of steps, {order}, fp64: closed form", 1e-12, error)


def written_out(module: TrainModule, config: Config, batches: list[Batch]) -> dict[str, Tensor]:
    """Returns the gradients of MAML's update, by copies of the module whose weights are set step by step."""
    names = [name for name, weight in module.named_parameters() if not name.startswith("inner_rates")]
    start = {name: dict(module.named_parameters())[name] for name in names}
    total = torch.zeros(())
    queries = [batch.take([row for row, part in enumerate(batch.labels[PART]) if part != SUPPORT]) for batch in batches]
    count = sum(module.prepare(batch, CTX).counts_K for batch in queries)
    for batch, asked in zip(batches, queries, strict=True):
        given = batch.take([row for row, part in enumerate(batch.labels[PART]) if part == SUPPORT])
        weights = dict(start)
        for _ in range(config.engine.meta.inner_steps):
            plan = module.prepare(given, CTX)
            loss = torch.func.functional_call(module, weights, (given, plan, plan.counts_K, CTX))[0]
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            weights = {
                name: w if g is None else w - config.engine.meta.inner_lr * g
                for (name, w), g in zip(weights.items(), grads, strict=True)
            }
        plan = module.prepare(asked, CTX)
        total = total + torch.func.functional_call(module, weights, (asked, plan, count, CTX))[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = torch.autograd.grad(total, list(start.values()), allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def test_an_update_is_the_gradient_of_all_queries_written_out() -> None:
    config = settings("none", "classifier", method="maml", inner_lr=1e-3)
    engine = engine_of(config)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = written_out(copy.deepcopy(engine.module), config, [episode(0), episode(1)])
    seen: dict[str, Tensor] = {}

    def keep(lr: float, skip_above: float) -> float:
        seen.update({n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None})
        return 1.0

    engine._apply = keep  # type: ignore[method-assign]
    engine.step([episode(0), episode(1)], CTX, 1e-3)
    for name, grad in expected.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-4, atol=1e-5)


def test_reptile_with_one_step_at_rate_1_is_gradient_descent_on_the_support() -> None:
    config = settings("none", "classifier", method="reptile", inner_steps=1, inner_lr=0.01)
    engine = engine_of(config)
    plain = copy.deepcopy(engine.module)
    given = episode(0).take([0, 1])
    plan = plain.prepare(given, CTX)
    plain(given, plan, plan.counts_K, CTX)[0].backward()
    engine.step([episode(0)], CTX, 1.0)
    after = dict(engine.module.named_parameters())
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(after[name], weight - 0.01 * weight.grad, rtol=1e-6, atol=1e-6)


def test_foblo_moves_along_the_outer_steps_alone() -> None:
    config = settings("none", "classifier", method="foblo", inner_steps=2, inner_lr=0.01)
    engine = engine_of(config)
    plain = copy.deepcopy(engine.module)
    names = [name for name, _ in plain.named_parameters() if not name.startswith("inner_rates")]

    def descended(batch: Batch, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            plain.zero_grad()
            plan = plain.prepare(batch, CTX)
            plain(batch, plan, plan.counts_K, CTX)[0].backward()
            with torch.no_grad():
                for weight in plain.parameters():
                    if weight.grad is not None:
                        weight -= 0.01 * weight.grad
        return {name: dict(plain.named_parameters())[name].detach().clone() for name in names}

    start = {name: dict(engine.module.named_parameters())[name].detach().clone() for name in names}
    inner = descended(episode(0).take([0, 1]), 2)
    outer = descended(episode(0).take([2, 3]), 1)
    engine.step([episode(0)], CTX, 0.5)
    after = dict(engine.module.named_parameters())
    for name in names:
        expected = start[name] + 0.5 * (outer[name] - inner[name])
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_foblo_adapts_by_the_objective_without_labels_and_learns_by_the_head() -> None:
    """Inner steps are those of the self-supervised loss on the support, outer ones those of the head on the queries."""
    config = settings("best_rq", "classifier", method="foblo", inner="objective", outer="task", inner_lr=0.01)
    engine = engine_of(config)
    assert isinstance(engine, MetaEngine)
    plan = engine._planned(episode(0), CTX)
    plain = copy.deepcopy(engine.module)
    learning = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}

    def descended(batch: Batch, passes: Sequence[Any], task: str) -> dict[str, Tensor]:
        for one in passes:
            plain.zero_grad()
            drawn = plain.prepare(batch, one.ctx)
            counts_K = drawn.counts_K * torch.tensor([float(name == task) for name in plain.tasks])
            plain(batch, drawn, counts_K, one.ctx)[0].backward()
            with torch.no_grad():
                for weight in learning.values():
                    if weight.grad is not None:
                        weight -= 0.01 * weight.grad
        return {name: weight.detach().clone() for name, weight in learning.items()}

    start = {name: weight.detach().clone() for name, weight in learning.items()}
    unlabelled = replace(plan.support, labels=dict.fromkeys(plan.support.labels, ("",) * 2))
    inner = descended(unlabelled, plan.inner, "objective")
    outer = descended(plan.queries, plan.outer, "task")
    parts = {part: [name for name in learning if name.startswith(part)] for part in ("model.", "objective.", "heads.")}
    assert all(parts.values())
    for before, after, moved in ((start, inner, {"model.", "objective."}), (inner, outer, {"model.", "heads."})):
        for part, names in parts.items():
            changed = any(not torch.equal(before[name], after[name]) for name in names)
            assert changed == (part in moved), part
    engine.step([episode(0)], CTX, 0.5)
    for name, weight in engine.module.named_parameters():
        if name in start:
            torch.testing.assert_close(weight, start[name] + 0.5 * (outer[name] - inner[name]), rtol=1e-5, atol=1e-6)


def test_shares_of_the_multi_step_loss_move_to_the_last_step() -> None:
    assert step_shares(0, 0, 4) == [0, 0, 0, 1]
    assert step_shares(10, 0, 4) == pytest.approx([0.25] * 4)
    assert step_shares(10, 5, 4) == pytest.approx([0.125, 0.125, 0.125, 0.625])
    assert step_shares(10, 10, 4) == [0, 0, 0, 1]


def test_the_head_alone_gives_the_update_of_whole_passes() -> None:
    """Where the head alone adapts, encoder passes are shared by all steps; their weights learn all the same."""
    found = []
    for method, adapt in (("anil", []), ("maml", ["heads.task"])):
        engine = engine_of(settings(method=method, adapt=adapt))
        if method == "maml":
            engine.head_alone = False  # type: ignore[attr-defined]
        engine.step([episode(0), episode(1)], CTX, 1e-3)
        found.append({name: weight.detach() for name, weight in engine.module.named_parameters()})
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=2e-5)


def test_two_ranks_with_one_episode_each_sum_to_one_rank_with_both() -> None:
    whole, parts = engine_of(settings(method="anil")), [engine_of(settings(method="anil")) for _ in range(2)]
    plans, counts = whole._prepare([episode(0), episode(1)], CTX)
    loss, _ = whole._accumulate([episode(0), episode(1)], plans, counts, CTX)
    share = torch.zeros((), dtype=torch.float64)
    for number, engine in enumerate(parts):
        own, _ = engine._prepare([episode(number)], CTX)
        share += engine._accumulate([episode(number)], own, counts, CTX)[0]
    torch.testing.assert_close(share, loss, rtol=1e-6, atol=1e-6)
    gradients = [dict(engine.module.named_parameters()) for engine in (whole, *parts)]
    for name, weight in gradients[0].items():
        if weight.grad is not None:
            summed = sum(own[name].grad for own in gradients[1:])
            torch.testing.assert_close(summed, weight.grad, rtol=1e-5, atol=1e-6)


def test_an_empty_micro_batch_adds_nothing() -> None:
    results = []
    for batches in ([episode(0)], [episode(0), episode(0).emptied(5)]):
        engine = engine_of(settings(method="maml"))
        results.append(engine.step(batches, CTX, 1e-3))
    assert results[0].loss == results[1].loss
    assert results[0].grad_norm == results[1].grad_norm


class Episodes:
    """A reader of synthetic episodes."""

    plan_hash = "episodes"

    def steps(self, cursor: Cursor | None = None) -> Any:
        number = cursor.step if cursor else 0
        while True:
            number += 1
            yield Step((episode(2 * number), episode(2 * number + 1)), 1, 1, Cursor(self.plan_hash, 0, number))

    def close(self) -> None:
        pass


def trained(folder: Path, config: Config, stop_after: int | None = None) -> Engine:
    run, engine, polls = RunFolder(folder), engine_of(config), iter(range(99))
    run.claim()
    heartbeat = Heartbeat(folder, 0, 600)
    train(config, engine, Episodes(), run, heartbeat, lambda: next(polls) + 1 == stop_after, say=lambda line: None)
    return engine


def test_a_stopped_run_continues_with_the_same_bits_and_learned_rates(tmp_path: Path) -> None:
    config = settings(method="maml", learn_lr=True, multi_step=4, adapt=["heads.task"])
    whole = dict(trained(tmp_path / "whole", config).tensors())
    trained(tmp_path / "parts", config, stop_after=3)
    resumed = dict(trained(tmp_path / "parts", config).tensors())
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    rates = [value for name, value in whole.items() if name.startswith("model/inner_rates")]
    assert len({float(rate) for value in rates for rate in value}) > 1
    with pytest.raises(ConfigError, match=r"engine\.meta\.inner_steps"):
        trained(tmp_path / "parts", settings(method="maml", learn_lr=True, inner_steps=3, adapt=["heads.task"]))


def test_prototypes_are_class_means_and_absent_classes_are_zeros() -> None:
    x_BP = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weight_WP, bias_W = prototypes(x_BP, torch.tensor([0, 2, 0, -1]), 3)
    torch.testing.assert_close(weight_WP[0], x_BP[0] + x_BP[2])
    torch.testing.assert_close(bias_W[2], -x_BP[1].square().sum())
    assert not weight_WP[1].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"zero_stage": 2}}, r"engine\.zero_stage=2: cannot run with engine\.name=meta: ZeRO"),
        ({"engine": {"compile": True}}, r"engine\.compile"),
        ({"engine": {"packed": True}}, r"engine\.packed"),
        ({"engine": {"activation_checkpointing": "full"}}, r"engine\.activation_checkpointing"),
        ({"engine": {"precision": "fp16"}}, r"engine\.precision"),
        ({"encoder": {"layer_drop": 0.1}}, r"encoder\.layer_drop=0\.1: draws at random"),
        ({"frontend": {"dropout": 0.1}}, r"frontend\.dropout"),
        ({"data": {"episodes": {"label": ""}}}, r"data\.episodes\.label"),
        ({"data": {"valid": ["folder"]}}, r"data\.valid"),
        ({"data": {"on_bad_shard": "skip"}}, r"data\.on_bad_shard"),
        ({"balance": {"measure": True}}, r"balance"),
        ({"engine": {"name": "torch"}}, r"data\.episodes\.label.*engine\.name=meta alone"),
        ({"engine": {"meta": {"inner": "text"}}}, r"engine\.meta\.inner.*one of the run's tasks: task"),
        ({"engine": {"meta": {"method": "reptile", "learn_lr": True}}}, r"engine\.meta\.learn_lr"),
        ({"engine": {"meta": {"method": "foblo", "multi_step": 3}}}, r"engine\.meta\.multi_step"),
        ({"engine": {"meta": {"outer_steps": 3}}}, r"engine\.meta\.outer_steps"),
        ({"engine": {"meta": {"method": "anil", "adapt": ["model.encoder"]}}}, r"engine\.meta\.adapt"),
        ({"engine": {"meta": {"method": "anil", "inner": "objective"}}}, r"engine\.meta\.inner"),
    ],
)
def test_what_cannot_run_in_an_adaptation_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(more=values)


def test_weights_that_do_not_exist_and_micro_batches_that_are_no_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.meta\.adapt=heads\.word: names no weight that learns"):
        build_model(settings(method="maml", adapt=["heads.word"]))
    ordinary = replace(episode(0), labels={})
    with pytest.raises(ConfigError, match="is no episode"):
        engine_of(settings(method="maml")).step([ordinary], CTX, 1e-3)
