"""Runs the documented commands that take seconds, in one folder, in the order in which they need each other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from launch.cli.outside import RECIPES
from launch.main import main
from tests.support.documented_commands import RUNS, Run, run_of, write_home
from tests.support.documents import PAGES, commands, write_plugins
from tests.support.paths import ROOT

SHOWN = {shlex.join(line): line for page in PAGES for line in commands(page)}


def arguments(line: list[str], run: Run, home: Path) -> list[str]:
    """Returns the words of a documented command for the folder `home`."""
    names = {
        **run.names,
        "MANIFEST": str(home / "speech" / "manifest.tsv"),
        "/data/": f"{home}/data/",
        "shards/train": "split/train",
        "shards/valid": "split/valid",
        "=/my/": f"={home}/my/",
    }
    anything = re.compile("|".join(map(re.escape, names)))
    words = [anything.sub(lambda found: names[found[0]], word) for word in (*line, *run.more)]
    return [word for word in words if word]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_documented_commands_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    for package in ("av", "onnxruntime", "PIL", "swift_f0", "tokenizers"):
        pytest.importorskip(package)
    home = tmp_path / "home"
    write_home(home)
    write_plugins(home / "my")
    for name in (plugins.VARIABLE, RECIPES):
        monkeypatch.setenv(name, "")  # restored after the test
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(home)
    failed = []
    for run in RUNS:
        wanted = [line for shown, line in SHOWN.items() if run_of(shown) is run] if isinstance(run, Run) else [run]
        for line in wanted:
            words = arguments(list(line), run, home) if isinstance(run, Run) else list(line)
            code = main(words)
            said = capsysbinary.readouterr()  # `speak out=-` writes samples
            if code:
                ends = (said.out[-500:] + said.err[-1500:]).decode(errors="replace")
                failed.append(f"{code}: auricle {shlex.join(words)}\n{ends}")
    assert not failed, "\n\n".join(failed)
