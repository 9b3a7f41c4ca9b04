"""Every command of "From a checkpoint to a phone" runs in the order of the page, with a teacher of a few updates."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.main import main
from launch.workflows import quantized_export
from tests.support.documented_commands import TRAINING, write_home
from tests.support.documents import commands
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "compression.md"
CHAIN = ("chain.units.steps=2", "chain.units.classes=20")
"""The rest of what makes a chain short; it has no `train.steps`."""
TIMED = ("--runs", "12", "--seconds", "2")
FIRST = "to train on: "
"""Begins the line in which the search prints the fields of a finalist."""
SHORTER: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    ("pretrain *dice_hubert_tiny*", tuple(x for x in (*TRAINING, *CHAIN) if not x.startswith("train.steps")), {}),
    ("pretrain *prune_tiny*", (*TRAINING, "objective.sparsity=0.01", "objective.sparsity_steps=1"), {}),
    (
        "pretrain *supernet_tiny*",
        (*TRAINING, "objective.elastic.warmup_steps=0", "data.micro_batches=3", "data.batch_seconds=12"),
        {},
    ),
    ("pretrain *", TRAINING, {}),
    ("targets *features=mfcc", ("classes=20",), {}),
    ("targets *", (), {"classes=100": "classes=20"}),
    ("evaluate *", ("corpora=made", "seeds=1", "bootstrap=100", "supervised.epochs=0", "neural.epochs=0"), {}),
    ("search-architecture *", ("--trials", "3", "--population", "2", "--finalists", "1"), {"0.004": "1", "1000": "4"}),
    ("bench --table *supernet_tiny*", TIMED, {"40": "16"}),
    ("bench *", ("--runs", "2", "--seconds", "2"), {}),
)
"""What is added to the first pattern that fits a command, and words that are replaced."""


def shorter(words: list[str], home: Path) -> list[str]:
    """Returns a documented command so that it takes seconds, with files of `home`."""
    shown = shlex.join(words)
    more, names = next(
        ((more, names) for pattern, more, names in SHORTER if fnmatch.fnmatchcase(shown, pattern)), ((), {})
    )
    manifest = str(home / "speech" / "manifest.tsv")
    return [names.get(word, word).replace("MANIFEST", manifest) for word in words] + [*more]


def finalist(words: list[str], printed: str) -> list[str]:
    """Returns the documented training of a finalist with the fields that the search printed."""
    fields = shlex.split(printed)
    return [word for word in words if not word.startswith(("init=", "encoder."))] + fields


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_from_a_checkpoint_to_a_phone_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnxruntime", "onnxscript", "optuna", "torchao"):
        pytest.importorskip(package)
    home = tmp_path / "home"
    write_home(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(home)
    monkeypatch.setattr(quantized_export, "POINTS_LOST", 0.1)  # probes of a few updates and utterances are noisy
    printed = ""
    for words in commands(PAGE):
        target = words[words.index(">") + 1] if ">" in words else ""
        line = shorter([word for word in words if word not in (">", target)] if target else words, home)
        if "name=finalist" in line:
            assert printed, "the search printed no finalist"
            line = finalist(line, printed)
        code = main(line)
        said = capsys.readouterr()
        assert code == 0, f"{code}: auricle {shlex.join(line)}\n{said.out[-500:]}{said.err[-2000:]}"
        if target:
            Path(target).write_text(said.out, encoding="utf-8")
        printed = next((text[len(FIRST) :] for text in said.out.splitlines() if text.startswith(FIRST)), printed)
    distilled = json.loads(Path("runs/finalist/config.json").read_text(encoding="utf-8"))
    assert distilled["objective"]["elastic"]["blocks"] == []
    assert distilled["encoder"]["widths"] in [json.loads(file.read_text()) for file in Path("found").glob("cut_*.json")]
    for program in re.findall(r"^    python (\S+/run\.py \S+\.wav)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        run, recording = program.split()
        found = subprocess.run(
            [sys.executable, run, recording.replace("recording", "talk")], capture_output=True, check=True, timeout=120
        )
        lines = [json.loads(text) for text in found.stdout.splitlines()]
        assert sum(len(one["features"]) for one in lines) > 0
