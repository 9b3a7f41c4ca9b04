"""All heads together: packed and recomputed rows, accumulation, resumes, and ZeRO 0 to 3 on two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import load
from pretrain import registry
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.configs import HeadConfig
from tests.support.contract_cases import CASES, FRONTENDS, HEADS, small
from tests.support.engine_cases import run_case
from tests.support.engine_runs import run

STEPS = 3
LABELLED = [0]
"""Micro-batches with labels: those of rank 0 alone."""
BALANCES = ("fixed", "uncertainty", "dwa", "gradnorm")
"""Of ZeRO 0 to 3."""


def heads(balance: str) -> dict[str, dict[str, Any]]:
    """Returns every head, without those whose loss may be negative where the balance refuses them."""
    found = {}
    for number, values in enumerate(HEADS.values()):
        described: HeadConfig = load(registry.config_type("heads", values["name"]), values)
        if not described.signed or balance in ("fixed", "gradnorm"):
            found[f"task_{number}"] = copy.deepcopy(values) | {"input": ("whole", "objective")[number % 2]}
    return found


def case(engine: str, stage: int = 1, balance: str = "fixed", **more: Any) -> dict[str, Any]:
    """Returns a case of BEST-RQ with all heads."""
    config = {
        "data": {"shards": "synthetic", "micro_batches": 4, "tokens": {}},
        "frontend": FRONTENDS["log_mel"],
        "encoder": small("encoders", "transformer", layer_drop=0.3),
        "objective": CASES["best_rq"],
        "heads": heads(balance),
        "balance": {"name": balance, "window": 1},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": STEPS},
        "engine": {"name": engine, "zero_stage": stage},
    }
    return {"config": config, "steps": STEPS, "labelled": LABELLED, **more}


def without_dropout(base: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """Returns a copy of a case with fields of `engine`, without dropout: its draws depend on the layout of rows."""
    made = copy.deepcopy(base)
    made["config"]["engine"] |= engine
    made["config"]["encoder"] |= {"dropout": 0.0, "attention_dropout": 0.0}
    made["config"]["frontend"] |= {"dropout": 0.0}
    for values in made["config"]["heads"].values():
        if "decoder" in values:
            values["decoder"]["dropout"] = 0.0
    return made


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_case(case("torch", balance="gradnorm"), DistributedContext())


def test_packed_and_recomputed_rows_train_all_heads_alike() -> None:
    torch.set_num_threads(1)
    base, world = case("torch", balance="gradnorm"), DistributedContext()
    plain = run_case(without_dropout(base), world)
    found = run_case(without_dropout(base, packed=True, activation_checkpointing="selective"), world)
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-4)


@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_recomputed_activations_train_all_heads_with_the_same_draws(plain: dict[str, Any], recomputed: str) -> None:
    made = case("torch", balance="gradnorm")
    made["config"]["engine"]["activation_checkpointing"] = recomputed
    found = run_case(made, DistributedContext())
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-5)


def test_a_resume_with_all_heads_has_the_same_bits(plain: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, world = str(tmp_path), DistributedContext()
    run_case(case("torch", balance="gradnorm", save=folder) | {"steps": 2}, world)
    resumed = run_case(case("torch", balance="gradnorm", load=folder), world)
    assert resumed["losses"] == plain["losses"][2:]
    assert resumed["digest"] == plain["digest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_0_to_3_on_two_ranks_equal_one_rank_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    one, two = {}, {}
    for stage, balance in enumerate(BALANCES):
        folder = str(tmp_path / f"zero{stage}")
        one[balance] = case("torch", balance=balance)
        two[balance] = case("deepspeed", stage, balance)
        two[f"{balance} first"] = case("deepspeed", stage, balance, save=folder) | {"steps": 2}
        two[f"{balance} after"] = case("deepspeed", stage, balance, load=folder)
        engine = {"packed": True, "activation_checkpointing": "selective"}
        two[f"{balance} packed"] = without_dropout(two[balance], **engine)
        one[f"{balance} packed"] = without_dropout(one[balance])
        one[f"{balance} after"] = case("torch", balance=balance, load=folder)
    found = run(tmp_path, "two", 2, two)  # saves what the cases of one rank load
    expected = run(tmp_path, "one", 1, one)
    for balance in BALANCES:
        whole, alone = found[balance], expected[balance]
        assert whole["losses"] == pytest.approx(alone["losses"], rel=1e-5), balance
        assert whole["norms"] == pytest.approx(alone["norms"], rel=1e-4), balance
        packed = found[f"{balance} packed"]["losses"]
        assert packed == pytest.approx(expected[f"{balance} packed"]["losses"], rel=1e-5), balance
        assert found[f"{balance} after"]["losses"] == whole["losses"][2:], balance
        assert found[f"{balance} after"]["digest"] == whole["digest"], balance
        assert expected[f"{balance} after"]["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5), balance
