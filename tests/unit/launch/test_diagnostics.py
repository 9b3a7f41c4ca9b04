"""`auricle doctor` reports missing requirements and how to install them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launch import diagnostics, main
from launch.diagnostics import Diagnosis
from launch.exit_codes import ExitCode


def test_this_machine_passes_all_required_checks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for topic in ("Python", "torch", "deepspeed", "gloo", "libsndfile", "FFmpeg", "SLURM", "ray", "memory", "disk"):
        assert topic in said
    (ops,) = (line for line in said.splitlines() if "DeepSpeed ops" in line)
    assert "missing" not in ops


def test_each_missing_requirement_is_reported_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", gone)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    findings = list(diagnostics.diagnose(tmp_path / "runs"))
    lacking = {finding.topic for finding in findings if finding.verdict != "ok"}
    assert {"deepspeed", "ray", "FFmpeg", "SLURM", "g++", "ninja", "transformers"} <= lacking
    assert all(finding.remedy for finding in findings if finding.verdict != "ok")


def test_a_missing_required_package_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diagnose(folder: Path) -> Iterator[Diagnosis]:
        yield Diagnosis("deepspeed", "missing", "not installed", "make setup")
        yield Diagnosis("GPU", "missing", "none", "buy one", needed=False)

    monkeypatch.setattr("launch.diagnostics.diagnose", diagnose)
    assert main.main(["doctor"]) == ExitCode.FAILED
    said = capsys.readouterr().out
    assert "not ready: deepspeed\n" in said
    assert "make setup" in said


def test_a_check_that_raises_is_reported_as_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(diagnostics, "_resources", broken)
    last = list(diagnostics.diagnose(tmp_path))[-1]
    assert last.verdict == "broken"
    assert "no /proc here" in last.found


def test_outside_the_checkout_no_remedy_names_a_distribution_that_no_index_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(diagnostics, "_operations", broken)
    monkeypatch.setattr(diagnostics, "CHECKOUT", tmp_path)
    found = list(diagnostics.diagnose(tmp_path))
    [remedy] = [finding.remedy for finding in found if "no /proc here" in finding.found]
    assert "install it again from where you got it" in remedy
    assert not [finding for finding in found if re.search(r"pip install .*\bauricle\b", finding.remedy)]
