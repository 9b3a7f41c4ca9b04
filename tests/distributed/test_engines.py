"""Every engine, ZeRO stage and number of ranks computes the same steps and loads checkpoints of all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_runs import case, furthest, run
from tests.support.parity_table import Parity

pytestmark = pytest.mark.timeout(600)  # the fixture runs all cases of this file
ENGINES = {"torch": ("torch", 1)} | {f"zero {stage}": ("deepspeed", stage) for stage in range(4)}

INT8 = {"fake_int8": 0.5}
"""Linear layers are rounded to 8 bits in the last half of the updates."""
VALIDATED = ("torch", "zero 1", "zero 3")


def dropping(engine: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a case in which half of the blocks get no gradient in a step; DeepSpeed uses ZeRO-3."""
    made = case(engine, 3, settings)
    made["config"]["encoder"] |= {"layers": 4, "layer_drop": 0.5}
    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs all cases on two ranks, then on one rank, which also loads checkpoints of two ranks."""
    tmp = tmp_path_factory.mktemp("engines")
    one = {"torch": case("torch"), "torch bf16": case("torch", settings={"precision": "bf16"})}
    one |= {"torch checkpointed": case("torch", settings={"activation_checkpointing": True})}
    one |= {f"zero {stage}": case("deepspeed", stage) for stage in range(4)}
    one |= {f"zero {stage} bf16": case("deepspeed", stage, settings={"precision": "bf16"}) for stage in range(4)}
    half = {"settings": {"precision": "fp16"}, "scale": 2.0**19}  # two updates overflow
    one |= {f"zero {stage} fp16": case("deepspeed", stage, **half) for stage in range(4)}
    one["torch fp16"] = case("torch", **half)
    one |= {f"zero {stage} fused": case("deepspeed", stage, settings={"fused": True}) for stage in (2, 3)}
    one["torch fused"] = case("torch", settings={"fused": True})
    one["torch int8"] = case("torch", settings=INT8)
    two = {"torch": case("torch")} | {f"zero {stage}": case("deepspeed", stage) for stage in range(4)}
    for stage in range(4):
        two[f"first half {stage}"] = case("deepspeed", stage, save=str(tmp / f"run{stage}")) | {"steps": 3}
        two[f"second half {stage}"] = case("deepspeed", stage, load=str(tmp / f"run{stage}"))
    two |= {f"zero {stage} int8": case("deepspeed", stage, settings=INT8) for stage in (1, 2)}
    two["offloaded"] = case("deepspeed", 2, settings={"offload": "cpu"})
    two |= {f"skipping {name}": case(*engine, skip_at=1, broken_at=3) for name, engine in ENGINES.items()}
    two |= {"dropping torch": dropping("torch"), "dropping offloaded": dropping("deepspeed", {"offload": "cpu"})}
    for name in VALIDATED:
        one[f"held out {name}"] = two[f"held out {name}"] = case(*ENGINES[name], held_out=3)
    results = {f"2 ranks, {name}": found for name, found in run(tmp, "two", 2, two).items()}
    three = {"torch": case("torch")} | {f"zero {stage}": case("deepspeed", stage) for stage in (2, 3)}
    three["from 2 to 3"] = case("deepspeed", 3, load=str(tmp / "run2"))
    results |= {f"3 ranks, {name}": found for name, found in run(tmp, "three", 3, three).items()}
    one |= {f"from {stage} to torch": case("torch", load=str(tmp / f"run{stage}")) for stage in range(4)}
    one |= {f"from 2 to {stage}": case("deepspeed", stage, load=str(tmp / "run2")) for stage in range(4)}
    return results | {f"1 rank, {name}": found for name, found in run(tmp, "one", 1, one).items()}


FUSED = ["1 rank, torch fused", "1 rank, zero 2 fused", "1 rank, zero 3 fused"]


WHOLE = [f"1 rank, zero {stage}" for stage in range(4)] + [f"2 ranks, zero {stage}" for stage in range(4)]


@pytest.mark.parametrize("name", [*WHOLE, *FUSED, "2 ranks, torch", "2 ranks, offloaded", "1 rank, torch checkpointed"])
def test_losses_and_norms_do_not_depend_on_the_engine(measured: dict[str, Any], name: str, parity: Parity) -> None:
    """Two ranks with batch size B make the same step as one rank with 2 · B."""
    found, reference = measured[name], measured["1 rank, torch"]
    ranks = "2 ranks × B = 1 rank × 2 B" if name.startswith("2") else "DeepSpeed, fused or checkpointed = plain torch"
    parity(f"{ranks}, every ZeRO stage: losses", 1e-6, furthest(found["losses"], reference["losses"]))
    ratios = [a / b for a, b in zip(found["norms"], reference["norms"], strict=True)]
    parity(f"{ranks}, every ZeRO stage: gradient norms (relative)", 1e-5, furthest(ratios, [1.0] * len(ratios)))


@pytest.mark.parametrize("stage", [1, 2])
def test_rounding_to_8_bits_does_not_depend_on_the_engine(measured: dict[str, Any], stage: int) -> None:
    """A sum in another order may round one value to the next of 255 steps, so the tolerance is wider."""
    found, reference = measured[f"2 ranks, zero {stage} int8"], measured["1 rank, torch int8"]
    half = len(reference["losses"]) // 2
    assert furthest(found["losses"], reference["losses"]) < 1e-3
    assert reference["losses"][:half] == measured["1 rank, torch"]["losses"][:half]
    assert furthest(reference["losses"][half:], measured["1 rank, torch"]["losses"][half:]) > 1e-5, "it has an effect"


@pytest.mark.parametrize("name", ["torch", "zero 2", "zero 3"])
def test_ranks_that_do_not_divide_the_micro_batches_compute_the_same_steps(
    measured: dict[str, Any], name: str, parity: Parity
) -> None:
    """Three ranks share four micro-batches in two rounds; two of them have an empty one in the last round."""
    found, reference = measured[f"3 ranks, {name}"], measured["1 rank, torch"]
    topic = "3 ranks of 4 micro-batches = 1 rank, every ZeRO stage"
    parity(f"{topic}: losses", 1e-6, furthest(found["losses"], reference["losses"]))
    ratios = [a / b for a, b in zip(found["norms"], reference["norms"], strict=True)]
    parity(f"{topic}: gradient norms (relative)", 1e-5, furthest(ratios, [1.0] * len(ratios)))


def test_a_checkpoint_of_two_ranks_continues_on_three(measured: dict[str, Any]) -> None:
    found, expected = measured["3 ranks, from 2 to 3"]["losses"], measured["1 rank, torch"]["losses"][3:]
    assert furthest(found, expected) < 1e-6


@pytest.mark.parametrize("stage", range(4))
def test_bf16_is_equal_under_both_engines_and_close_to_fp32(measured: dict[str, Any], stage: int) -> None:
    torch, zero = measured["1 rank, torch bf16"], measured[f"1 rank, zero {stage} bf16"]
    assert zero["losses"] == pytest.approx(torch["losses"], abs=1e-4)
    assert torch["losses"] == pytest.approx(measured["1 rank, torch"]["losses"], rel=2e-2)
    assert torch["losses"] != measured["1 rank, torch"]["losses"]


@pytest.mark.parametrize("stage", range(4))
def test_fp16_is_equal_under_both_engines_and_close_to_fp32(measured: dict[str, Any], stage: int) -> None:
    torch, zero = measured["1 rank, torch fp16"], measured[f"1 rank, zero {stage} fp16"]
    assert zero["losses"] == pytest.approx(torch["losses"], abs=1e-4)
    assert zero["norms"] == pytest.approx(torch["norms"], rel=1e-2)
    assert torch["losses"] == pytest.approx(measured["1 rank, torch"]["losses"], rel=2e-3)
    assert torch["losses"] != measured["1 rank, torch"]["losses"]
    assert zero["scale"] == torch["scale"] < 2.0**19, "the same updates overflowed and were repeated"


@pytest.mark.parametrize("name", VALIDATED)
def test_held_out_loss_depends_on_neither_ranks_nor_engine_and_changes_no_bit_of_training(
    measured: dict[str, Any], name: str, parity: Parity
) -> None:
    """Three held-out micro-batches on two ranks: one rank repeats one, which must not count."""
    reference = measured["1 rank, held out torch"]["held_out"]
    for ranks in ("1 rank", "2 ranks"):
        found, without = measured[f"{ranks}, held out {name}"], measured[f"{ranks}, {name}"]
        parity("held-out loss, every engine and number of ranks", 1e-6, furthest(found["held_out"], reference))
        assert found["losses"] == without["losses"]
        assert found["digest"] == without["digest"]
    assert reference[-1] < reference[0] - 0.05, "it falls with training, so that it is measured on the new weights"


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(
    measured: dict[str, Any], stage: int, parity: Parity
) -> None:
    whole, resumed = measured[f"2 ranks, zero {stage}"], measured[f"2 ranks, second half {stage}"]
    parity("resumed = uninterrupted, every ZeRO stage: losses", 0, furthest(resumed["losses"], whole["losses"][3:]))
    assert resumed["digest"] == whole["digest"]


@pytest.mark.parametrize("name", [f"from {s} to torch" for s in range(4)] + [f"from 2 to {s}" for s in range(4)])
def test_a_checkpoint_loads_on_other_ranks_stages_and_engines(
    measured: dict[str, Any], name: str, parity: Parity
) -> None:
    found, expected = measured[f"1 rank, {name}"]["losses"], measured["1 rank, torch"]["losses"][3:]
    parity("resumed on other ranks, stage or engine = uninterrupted: losses", 1e-6, furthest(found, expected))


@pytest.mark.parametrize("name", ENGINES)
def test_an_outlier_is_skipped_and_a_broken_batch_discarded_under_every_engine(
    measured: dict[str, Any], name: str
) -> None:
    """Weights and moments are unchanged: later losses equal those of the plain torch engine."""
    found, torch = measured[f"2 ranks, skipping {name}"]["losses"], measured["2 ranks, skipping torch"]["losses"]
    whole = measured["2 ranks, torch"]["losses"]
    assert found[3] is None
    assert [found[step] for step in (0, 1, 2, 4)] == pytest.approx([torch[step] for step in (0, 1, 2, 4)], abs=1e-6)
    assert found[:2] == pytest.approx(whole[:2], abs=1e-6)
    assert abs(found[2] - whole[2]) > 1e-4  # the update of step 1 was skipped


def test_a_dropped_block_has_no_stale_gradient_in_host_memory(measured: dict[str, Any]) -> None:
    found, expected = measured["2 ranks, dropping offloaded"], measured["2 ranks, dropping torch"]
    assert furthest(found["losses"], expected["losses"]) <= 1e-6
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_losses(tmp_path: Path) -> None:
    cases = {"eager": case("torch"), "compiled": case("torch", settings={"compile": True})}
    for found in cases.values():
        found["config"]["encoder"] |= {"dropout": 0.0, "attention_dropout": 0.0}
        found["config"]["frontend"] |= {"dropout": 0.0}
    measured = run(tmp_path, "compile", 1, cases)
    assert measured["compiled"]["losses"] == pytest.approx(measured["eager"]["losses"], abs=1e-5)
