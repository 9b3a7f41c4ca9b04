"""Every command of "Meta-learning" runs in the order of the page, on tones, with a few updates."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from launch.main import main
from tests.support.documented_commands import FEW_SHOT, TRAINING
from tests.support.documents import commands
from tests.support.paths import ROOT
from tests.support.tones import PITCHES, write_tones

PAGE = ROOT / "docs" / "meta_learning.md"
SMALL = tuple(
    word for word in TRAINING if not word.startswith(("engine.name", "data.max_seconds", "data.batch_seconds"))
)
EPISODES = (
    "data.batch_seconds=40",
    "data.episodes.ways=2",
    "data.episodes.queries=2",
    "data.max_seconds=2",
    "encoder.layers=1",
)
SIZES = ("frontend.subsampling=2", "encoder.positions=conv_stack", "encoder.conv_positions_depth=2")
BASE = (
    "pretrain", "+experiment=best_rq_tiny", "data.shards=words", "name=T", *SIZES, "encoder.conv_positions_kernel=19",
    "encoder.layers=1", *TRAINING,
)  # fmt: skip
"""The pretrained encoder with which the page begins."""


def run(words: list[str]) -> None:
    code = main(words)
    assert code == 0, f"{code}: auricle {shlex.join(words)}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_of_meta_learning_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    write_tones(Path("speech"))
    shown = commands(PAGE)
    assert [line[0] for line in shown] == ["preprocess", "pretrain", "evaluate", "adapt", "pretrain"]
    for label in PITCHES:
        Path("clips", label).mkdir(parents=True)
        for take in range(3):
            shutil.copy(Path("speech", f"0-{label}-{take}.wav"), Path("clips", label))
    shutil.copy("speech/4-high-0.wav", "new1.wav")
    shutil.copy("speech/4-low-0.wav", "new2.wav")
    more = {
        "preprocess": ("min_shards=2",),
        "pretrain": (*SMALL, *EPISODES),
        "evaluate": tuple(word.replace("=made", "=tones") for word in FEW_SHOT),
        "adapt": ("--steps", "2"),
    }
    for line in shown:
        given = [word.replace("MANIFEST", "speech/manifest.tsv") for word in line]
        if "data.episodes.label=language" in given:
            given = [word.replace("label=language", "label=label") for word in given]
        capsys.readouterr()
        run([*given, *more[line[0]]])
        if line[0] == "evaluate":
            table = capsys.readouterr().out
            assert all(f"{way} 2-way 1-shot" in table for way in ("accuracy, meta-learned,", "accuracy of prototypes,"))
        if line[0] == "adapt":
            classified = [row.split("\t")[:2] for row in capsys.readouterr().out.splitlines() if "\t" in row]
            assert [file for file, label in classified if label in PITCHES] == ["new1.wav", "new2.wav"]
        if line[0] == "preprocess":
            run(list(BASE))
    words, adapted = Path("runs/maml_words_tiny"), Path("runs/adapt_clips")
    rows = read_rows(words / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["meta/query_loss_after"] > 0 for row in rows)
    assert (adapted / "tuned" / "model.safetensors").is_file()
