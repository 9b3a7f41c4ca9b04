"""Each objective and each encoder's options on two ranks under ZeRO 1 and 3 against plain torch on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.contract_cases import CASES, ENCODERS, FRONTENDS, HEADS, small
from tests.support.engine_runs import run

pytestmark = pytest.mark.timeout(600)  # the fixtures start all cases of this file
STEPS = 3
OPTIONS = {
    "layers": 4,
    "half_rate_blocks": 2,
    "attention": "local_global",
    "window": 8,
    "registers": 2,
    "full_every": 2,
    "stochastic_depth": 0.2,
}


def optional(encoder: str, engine: str, stage: int = 1) -> dict[str, Any]:
    """Returns a case with packed rows, selective activation checkpointing and all options of the block stack."""
    made = case("best_rq", engine, stage)
    made["config"]["encoder"] = small("encoders", encoder, **OPTIONS)
    made["config"]["engine"] |= {"packed": True, "activation_checkpointing": "selective"}
    return made


def pruned(name: str, engine: str, stage: int = 1) -> dict[str, Any]:
    """Returns a case of distillation with gates, whose draws and multipliers must not depend on ranks."""
    made = case("distil", engine, stage)
    made["config"]["objective"] = CASES["distil"] | {"sparsity": 0.5, "sparsity_steps": 2}
    return made


def supernet(name: str, engine: str, stage: int = 1) -> dict[str, Any]:
    """Returns a case of a supernet, whose micro-batches train the largest, the smallest and drawn subnets."""
    made = case("distil", engine, stage, micro_batches=4)
    elastic = {"blocks": [1, 2], "heads": [1, 2], "ffn": [32, 64], "warmup_steps": 1}
    made["config"]["objective"] = CASES["distil"] | {"elastic": elastic}
    return made


PRUNED, SUPERNET = "distil, pruned", "distil, supernet"


def multitask(engine: str, stage: int = 1, **more: Any) -> dict[str, Any]:
    """Returns a case with three heads under GradNorm.

    Texts and speakers are in micro-batch 0 alone, of rank 0, and nowhere in the second update.
    """
    made = case("best_rq", engine, stage, micro_batches=4, labelled=[0], unlabelled_at=1, **more)
    made["config"]["heads"] = {
        "text": {"name": "ctc", "weight": 0.5},
        "who": {"name": "classifier", "classes": ["ann", "bob"], "input": "whole"},
        "mel": {"name": "reconstruction", "frames": "masked"},
    }
    made["config"]["balance"] = {"name": "gradnorm"}
    return made


def joint(engine: str, stage: int = 1, **more: Any) -> dict[str, Any]:
    """Returns a case with a joint embedding, whose queue gets the micro-batches of both ranks."""
    made = case("best_rq", engine, stage, micro_batches=4, labelled=[0, 1, 3], **more)
    made["config"]["heads"] = {"joint": HEADS["joint_embedding, softmax, queue"] | {"input": "whole"}}
    return made


def case(objective: str, engine: str, stage: int = 1, micro_batches: int = 2, **more: Any) -> dict[str, Any]:
    config = {
        "data": {"shards": "synthetic", "micro_batches": micro_batches},
        "frontend": FRONTENDS["log_mel"],
        "encoder": small("encoders", "transformer", layer_drop=0.3),
        "objective": CASES[objective],
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": STEPS},
        "engine": {"name": engine, "zero_stage": stage},
    }
    return {"config": config, "steps": STEPS, **more}


MAKERS = dict.fromkeys(CASES, case) | dict.fromkeys(ENCODERS, optional) | {PRUNED: pruned, SUPERNET: supernet}
ALSO_UNDER_ZERO_1 = ("best_rq", PRUNED, SUPERNET)
"""Of the other cases ZeRO 1 is a slow test: they differ in the objective alone, which ZeRO 3 asks more of."""
REFUSES_ZERO_3 = (SUPERNET,)
QUICK = [(name, 3) for name in MAKERS if name not in REFUSES_ZERO_3] + [(name, 1) for name in ALSO_UNDER_ZERO_1]
HEADED = [("multitask", 3), ("joint", 3)]
"""All heads under every stage: tests/distributed/test_every_head.py."""
SLOW = [name for name in MAKERS if name not in ALSO_UNDER_ZERO_1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp = tmp_path_factory.mktemp("objectives")
    one = {name: make(name, "torch") for name, make in MAKERS.items()}
    two = {f"{name}, zero {stage}": MAKERS[name](name, "deepspeed", stage) for name, stage in QUICK}
    one["multitask"], one["joint"] = multitask("torch"), joint("torch")
    for name, stage in HEADED:
        make = {"multitask": multitask, "joint": joint}[name]
        folder = str(tmp / f"{name}{stage}")
        two[f"{name}, zero {stage}"] = make("deepspeed", stage)
        two[f"{name} first, zero {stage}"] = make("deepspeed", stage, save=folder) | {"steps": 2}
        two[f"{name} after, zero {stage}"] = make("deepspeed", stage, load=folder)
    one["multitask after"] = multitask("torch", load=str(tmp / "multitask3"))
    one["joint after"] = joint("torch", load=str(tmp / "joint3"))
    found = run(tmp, "two", 2, two)  # saves what a case of one rank loads
    return found | run(tmp, "one", 1, one)


@pytest.mark.parametrize(("name", "stage"), [*QUICK, *HEADED])
def test_losses_equal_those_of_one_rank(measured: dict[str, Any], name: str, stage: int) -> None:
    same(measured[f"{name}, zero {stage}"], measured[name])


@pytest.mark.slow
def test_losses_under_zero_1_equal_those_of_one_rank(measured: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, "two", 2, {name: MAKERS[name](name, "deepspeed", 1) for name in SLOW})
    for name in SLOW:
        same(found[name], measured[name])


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize(("name", "stage"), HEADED)
def test_heads_with_labels_on_one_rank_resume_with_the_same_bits_and_on_another_number_of_ranks(
    measured: dict[str, Any], name: str, stage: int
) -> None:
    whole, resumed = measured[f"{name}, zero {stage}"], measured[f"{name} after, zero {stage}"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["digest"] == whole["digest"]
    assert measured[f"{name} after"]["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)


ENGINES = (
    pytest.param(("torch", 1), id="torch"),
    pytest.param(("deepspeed", 1), id="zero 1", marks=pytest.mark.slow),
    pytest.param(("deepspeed", 3), id="zero 3", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=ENGINES)
def relabelled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Runs the efficient default over update 1, after which its units come from one of its own layers."""
    tmp, name, engine = tmp_path_factory.mktemp("relabelled"), "efficient, relabelled", request.param
    cases = {"whole": case(name, *engine)}
    for done in (1, 2):  # resumed directly before and after that update
        folder = str(tmp / f"{done}")
        cases[f"first {done}"] = case(name, *engine, save=folder) | {"steps": done}
        cases[f"after {done}"] = case(name, *engine, load=folder)
    cases["first 1"]["save_seconds"] = 2.0  # rank 1 looks for the checkpoint before it exists
    # the update is skipped, and the checkpoint saved directly after it
    folder, lost = str(tmp / "lost"), {"skip_at": 1}
    cases["whole without 1"] = case(name, *engine, **lost)
    cases["first without 1"] = case(name, *engine, save=folder, **lost) | {"steps": 2}
    cases["after without 1"] = case(name, *engine, load=folder)
    one = {"one rank without 1": case(name, "torch", skip_at=1)}
    return run(tmp, "one", 1, one) | run(tmp, "two", 2, cases)


@pytest.mark.parametrize(("part", "done"), [("1", 1), ("2", 2), ("without 1", 2)])
def test_a_resume_around_the_relabelling_is_bit_identical(relabelled: dict[str, Any], part: str, done: int) -> None:
    whole = relabelled["whole without 1" if part == "without 1" else "whole"]
    resumed = relabelled[f"after {part}"]
    assert resumed["losses"] == whole["losses"][done:]
    assert resumed["digest"] == whole["digest"]


def test_a_skipped_relabelling_is_done_at_the_next_update_on_all_ranks(relabelled: dict[str, Any]) -> None:
    found, expected = relabelled["whole without 1"], relabelled["one rank without 1"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    whole = relabelled["whole"]["losses"]
    assert found["losses"][:2] == whole[:2]
    assert abs(found["losses"][2] - whole[2]) > 0.1, "without the relabelling the units are still the first ones"
