"""An outlier is skipped, and a broken batch thrown away, alike under every engine: weights and moments stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_runs import case, run

ENGINES = {"torch": ("torch", 1)} | {f"zero {stage}": ("deepspeed", stage) for stage in range(4)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp: Path = tmp_path_factory.mktemp("skipped")
    cases = {name: case(engine, stage, skip_at=1, broken_at=3) for name, (engine, stage) in ENGINES.items()}
    cases["whole"] = case("torch")
    return run(tmp, "two", 2, cases)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_skips_alike(measured: dict[str, Any], name: str) -> None:
    found, torch, whole = measured[name]["losses"], measured["torch"]["losses"], measured["whole"]["losses"]
    assert found[3] is None
    assert [found[step] for step in (0, 1, 2, 4)] == pytest.approx([torch[step] for step in (0, 1, 2, 4)], abs=1e-6)
    assert found[:2] == pytest.approx(whole[:2], abs=1e-6)
    assert abs(found[2] - whole[2]) > 1e-4  # the update of step 1 was left out
