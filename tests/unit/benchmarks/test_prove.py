"""The programs of benchmarks/prove import the product as it is now, and name the variable for real speech."""

from __future__ import annotations

import importlib
import sys

import pytest

from data_pipeline.corpora.local_speech import SPEECH_VARIABLE
from tests.support.paths import ROOT

PROGRAMS = sorted(
    file.stem
    for file in (ROOT / "benchmarks" / "prove").glob("*.py")
    if "def main(" in file.read_text(encoding="utf-8")  # others hold what programs share
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_real_speech_the_variable_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(SPEECH_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    program = importlib.import_module(f"benchmarks.prove.{name}")
    assert program.main() in (0, 2)
    said = capsys.readouterr()
    assert SPEECH_VARIABLE in said.out + said.err
