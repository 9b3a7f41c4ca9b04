"""Runs the README's commands on a small corpus in a temporary home folder: raw audio to a checkpoint and curves."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo_corpus import synthesise
from launch.main import main
from tests.support.documents import PAGES, cells, commands, programs
from tests.support.paths import ROOT

README = ROOT / "README.md"
SMALL = [
    "train.steps=6",
    "train.checkpoint_every=3",
    "data.batch_seconds=32",
    "encoder.layers=1",
    "encoder.dim=64",
    "health.on_collapse=warn",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a home folder with a folder `speech`, in which one file is broken."""
    home = tmp_path_factory.mktemp("home")
    synthesise(home / "speech", 24)
    (home / "speech" / "broken.wav").write_bytes(b"RIFF, but no more than that")
    return home


def auricle(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "launch.main", *arguments]
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=home, env=environment)


def command(word: str) -> list[str]:
    """Returns the arguments of the README's first command that has the argument `word`."""
    return next(line for line in commands(README) if word in line)


@pytest.fixture(scope="module")
def shards(home: Path) -> Path:
    """Runs the README's preprocess command and returns the folder of its shards."""
    done = auricle(home, *command("preprocess"), "ray.num_cpus=2")
    assert done.returncode == 0, done.stderr
    assert "rejected files" in done.stdout
    return home / "shards"


@pytest.fixture(scope="module")
def run_folder(home: Path, shards: Path) -> Path:
    """Runs the README's pretrain command under the deepspeed launcher on two ranks, and returns its run folder."""
    done = auricle(home, *command("launcher.processes=2"), *SMALL)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "best_rq_tiny"


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("    make demo") for line in lines)
    assert any(line.startswith("    make test") for line in lines)


def test_doctor_finds_everything_it_needs(home: Path) -> None:
    done = auricle(home, *command("doctor"))
    assert done.returncode == 0, done.stdout
    assert "all requirements are met" in done.stdout


def test_a_repeated_preprocess_command_does_nothing(home: Path, shards: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.tar")}
    done = auricle(home, *command("preprocess"))
    assert done.returncode == 0, done.stderr
    assert {file.name: file.stat().st_mtime_ns for file in shards.glob("*.tar")} == before


def test_shard_commands_succeed(home: Path, shards: Path) -> None:
    assert auricle(home, *command("stats")).returncode == 0
    assert auricle(home, "shards", "verify", "shards/").returncode == 0


def test_the_run_folder_documents_the_run(run_folder: Path) -> None:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    for name in ("config.json", "config.yaml", "environment.json", "git.diff", "logs/rank_0.log", "logs/rank_1.log"):
        assert (run_folder / name).is_file()
    assert (run_folder / "checkpoints" / "latest").read_text().strip() == "step_00000006"


def test_tensorboard_reads_the_curves(run_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tb"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {"loss/total", "opt/lr", "opt/grad_norm", "perf/audio_seconds_per_second", "perf/data_wait_share"}
    assert wanted | {"perf/step_seconds", "metric/perplexity", "metric/code_usage"} <= scalars
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 7))


def test_more_steps_continue_the_run(home: Path, run_folder: Path) -> None:
    done = auricle(home, *command("launcher.processes=2"), *SMALL, "train.steps=8", "launcher.processes=1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    refused = auricle(home, *command("launcher.processes=2"), *SMALL, "optimizer.lr=0.5")
    assert refused.returncode == 2
    assert "optimizer.lr" in refused.stderr


def test_the_python_programs_of_the_documentation_run(home: Path, shards: Path, run_folder: Path) -> None:
    shown = [*programs(README), *programs(ROOT / "docs" / "python_api.md")]
    assert len(shown) == 2
    assert len(programs(README)[0].strip().splitlines()) <= 11
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    checked = [*shown, "assert layers_LFD.ndim == 3 and batches[0].wave_BT.ndim == 2"]
    done = subprocess.run([sys.executable, "-c", "\n".join(checked)], cwd=home, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_notebook_runs(home: Path, shards: Path, run_folder: Path) -> None:
    shown = cells(ROOT / "docs" / "first_steps.ipynb")
    assert len(shown) > 5
    checked = [*shown, "assert similarity_NN.shape[0] == len(batch.keys) and len(rows) == run.step"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    line = [sys.executable, "-W", "ignore", "-c", "\n".join(checked)]
    done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "frames per second" in done.stdout


QUICK = (
    "compare runs/a runs/b",
    "completion bash",
    "data plan",
    "export runs/NAME model_folder --to torchscript",
    "jobs list",
    "jobs status NAME",
    "recipes",
    "runs",
    "shards inspect",
    "shards stats",
    "shards verify",
)
"""Beginnings of documented commands of all pages that take a few seconds at most on the run and shards made here."""


@pytest.mark.parametrize("beginning", QUICK)
def test_a_quick_documented_command_succeeds(
    beginning: str, home: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = (shlex.join(line) for page in PAGES for line in commands(page))
    line = min((line for line in shown if f"{line} ".startswith(f"{beginning} ")), key=len)
    line = re.sub(r"\bruns/(a|b|NAME)\b", f"runs/{run_folder.name}", line)
    more = {
        "data plan": [option for option in SMALL if option.startswith("data.")],
        "recipes": ["best_rq_tiny", "wav2vec2_base"],  # all of them take half a minute
    }.get(beginning, [])
    monkeypatch.chdir(home)
    assert main([*shlex.split(re.sub(r"\bNAME\b", run_folder.name, line)), *more]) == 0
    assert capsys.readouterr().out.strip()


def test_cfg_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--cfg")) == 0
    assert "lr: 0.0003" in capsys.readouterr().out


def test_a_misspelt_field_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "+experiment=best_rq_tiny", "data.shards=shards/", "optimiser.lr=1e-3"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preprocess", "corpus.path=nowhere", "out=o"], ["nowhere"]),
        (["preprocess", "corpus.path=empty", "out=o"], ["empty"]),
        (["pretrain", "+experiment=best_rq_tiny", "data.shards=nowhere", "name=a"], ["auricle preprocess"]),
        (["pretrain", "+experiment=best_rq_tiny", "data.shards=empty", "name=a"], ["empty"]),
    ],
)
def test_unusable_input_gives_a_message_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert all(word in printed for word in words)
