"""Runs the documented commands that take seconds, in one folder, in the order in which they need each other."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.loopback import free_port
from data_pipeline.core.schema import ConfigError
from launch.cli.outside import RECIPES
from launch.federation.flower import find_flower
from launch.main import main
from tests.support.documented_commands import DEVICES, RUNS, Run, run_of, write_home
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with what documented commands read, in which they run."""
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
    return home


def lines_of(run: Run | tuple[str, ...], home: Path) -> list[list[str]]:
    """Returns the words of the commands that belong to an entry of RUNS."""
    if not isinstance(run, Run):
        return [list(run)]
    return [arguments(line, run, home) for shown, line in SHOWN.items() if run_of(shown) is run]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_documented_commands_succeed(home: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    failed = []
    for run in RUNS:
        if isinstance(run, Run) and run.flower:
            continue  # in the next test
        for words in lines_of(run, home):
            code = main(words)
            said = capsysbinary.readouterr()  # `speak out=-` writes samples
            if code:
                ends = (said.out[-500:] + said.err[-1500:]).decode(errors="replace")
                failed.append(f"{code}: auricle {shlex.join(words)}\n{ends}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documented_commands_with_flower_succeed(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        find_flower()
    except ConfigError as error:
        pytest.skip(str(error))
    assert [main(list(words)) for words in DEVICES] == [0] * len(DEVICES)
    address, ran = f"127.0.0.1:{free_port()}", []
    for run in RUNS:
        if not isinstance(run, Run) or not run.flower:
            continue
        for words in lines_of(run, home):
            if words[0] == "device":  # answers until it is stopped, which the next command's third device is
                own = [word.replace("127.0.0.1:9092", address) for word in words]
                device = subprocess.Popen([sys.executable, "-m", "launch.main", *own])
                continue
            code = main([*words, f"engine.federated.server={address}"])
            device.terminate()
            assert code == 0, f"auricle {shlex.join(words)}\n{capfd.readouterr().err[-2500:]}"
            ran.append(words)
    device.wait(30)
    rounds = [row for path in Path("runs").glob("*/metrics.jsonl") for row in read_rows(path)]
    assert len({path.parent.name for path in Path("runs").glob("*/metrics.jsonl")}) == len(ran) == 5
    assert {row["federated/devices"] for row in rounds} == {3}
