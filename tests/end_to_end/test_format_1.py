"""Data sets and runs of an earlier version: every command reads tests/fixtures/format_1.

The fixture holds one shard of three voices, frame labels on it, and a run of two updates, all written by the version
before the packages were arranged by responsibility. LOSSES are what that version reached when it continued the run.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.kmeans import all_labelled
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.loader.reader import open_reader
from data_pipeline.sampling.config import DataConfig
from launch import main
from launch.workers import rank
from pretrain.evaluate.frozen_encoders import open_encoder
from tests.support.paths import ROOT

LOSSES = {3: 3.674206, 4: 3.574748}
"""Loss by update."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a working directory with the shards, the labels and the run of the fixture."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "format_1", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """Restores the signal handlers that a rank replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def overrides(home: Path) -> list[str]:
    """Returns the command-line overrides of the run."""
    environment = json.loads((home / "runs" / "tiny" / "environment.json").read_text())
    return [str(argument) for argument in environment["command"][2:]]


def test_shards_are_read(home: Path) -> None:
    assert main.main(["shards", "verify", "shards"]) == 0
    config = DataConfig(shards="shards", batch_seconds=5.0, micro_batches=1, min_seconds=0.5, max_seconds=2.0)
    reader = open_reader(config, 0, 0, 1)
    (batch,) = next(reader.steps(None)).batches
    assert sorted(batch.lengths_B.tolist()) == [25_600, 28_800, 32_000]
    reader.close()


def test_labels_are_read(home: Path) -> None:
    labels = LabelMetadata.read("labels")
    assert (labels.rate_hz, labels.classes) == (100, 4)
    assert all_labelled(TargetsConfig(shards="shards", out="labels", classes=4, fraction=1.0), "")


@pytest.mark.usefixtures("keep_signals")
def test_a_run_is_continued(home: Path) -> None:
    """Its config has engine.name=local, and its losses equal those of the version that wrote it."""
    arguments = ["pretrain", *overrides(home), "train.steps=4", "--prepare"]
    assert main.main(arguments) == 0
    assert rank.main("runs/tiny") == 0
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["loss/total"] for row in rows[2:]} == pytest.approx(LOSSES, rel=1e-4)


def test_a_run_is_evaluated_and_exported(home: Path) -> None:
    encoder = open_encoder("runs/tiny", "cpu")
    assert encoder is not None
    Path("audio").mkdir()
    lines = ["path\tspeaker\ttext\tlabel\tlanguage\tcorpus\tsplit"]
    for number in range(4):
        wave = np.random.default_rng(number).normal(0, 0.1, 16_000).astype(np.float32)
        soundfile.write(f"audio/{number}.wav", wave, 16_000)
        lines.append(f"audio/{number}.wav\ts{number}\t\t\t\tx\t{('train', 'valid', 'test', 'test')[number]}")
    Path("manifest.tsv").write_text("\n".join(lines) + "\n")
    Path("phones").mkdir()
    rows = "".join(f"audio/{n}.wav\t0.0\t0.5\tAH\naudio/{n}.wav\t0.5\t1.0\tB\n" for n in range(4))
    Path("phones/auto_pocketsphinx.tsv").write_text("path\tstart_s\tend_s\tphone\n" + rows)
    arguments = [
        "checkpoint=runs/tiny",
        "task=rankme",
        "manifest=manifest.tsv",
        "corpora=x",
        "baselines=false",
        "seeds=1",
    ]
    assert main.main(["evaluate", *arguments]) == 0
    assert main.main(["export", "runs/tiny", "exported", "--to", "torchscript"]) == 0


def test_runs_and_compare_list_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/tiny", "runs/twin")
    assert main.main(["runs"]) == 0
    assert "2/2" in capsys.readouterr().out
    assert main.main(["compare", "runs/tiny", "runs/twin"]) == 0
    assert "best_rq" not in capsys.readouterr().out, "no config field differs"
    assert main.main(["jobs", "list"]) == 0
    assert "tiny" in capsys.readouterr().out
