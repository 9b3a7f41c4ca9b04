"""The benchmark of a GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def test_a_rehearsal_on_the_cpu_runs_every_part(tmp_path: Path) -> None:
    """All parts but the times of whole recipes, which tests/unit/benchmarks/test_train_step.py covers."""
    parts = ["tests", "agreement", "attention", "layouts", "profile", "zero_2"]
    command = ["benchmarks/gpu.sh", "--device", "cpu", "--steps", "1", "--quick", "--out", str(tmp_path / "gpu")]
    run = subprocess.run(
        [*command, "--parts", *parts],
        cwd=ROOT,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {part for part in parts if "skipped" in report[part]} == {"tests", "zero_2"}
    assert all(report[part]["rows"] for part in ("agreement", "attention", "layouts", "profile"))
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"## {part}" in table for part in parts)


def test_a_failed_part_is_reported_and_the_exit_code_is_1(tmp_path: Path) -> None:
    code = """
import sys
from benchmarks import gpu
def broken(args): raise ValueError("planted")
gpu.measure_attention = broken
sys.argv = ["gpu", "--device", "cpu", "--steps", "1", "--quick", "--parts", "attention", "tests", "--out", sys.argv[1]]
sys.exit(gpu.main())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "gpu")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "planted" in report["attention"]["error"]
    assert "skipped" in report["tests"], "the other parts run"
