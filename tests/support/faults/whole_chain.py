"""A tiny chain of preprocess → targets → pretrain → evaluate, for the tests of every launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import main
from launch.demo_corpus import synthesise
from tests.support.tones import quick, write_tones

STEPS = 4
HUBERT = (
    "objective=hubert", "objective.mask_span=3", "objective.projection_dim=16", "frontend=log_mel",
    "frontend.subsampling=2", "encoder=transformer_tiny", "encoder.dim=32", "encoder.heads=2", "encoder.layers=2",
    "encoder.ffn_dim=64", "data.batch_seconds=8", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2",
    "data.workers=1", "schedule.warmup_steps=3", "train.checkpoint_every=2", "train.media_every=0",
    "engine.name=torch", "health.on_collapse=warn", "name=toy",
)  # fmt: skip
ONE_TURN = (f"train.steps={STEPS}",)
TWO_TURNS = (
    f"chain.it1.steps={STEPS}", "chain.it1.classes=8", "chain.it1.fraction=1",
    f"chain.it2.steps={STEPS}", "chain.it2.classes=12", "chain.it2.layer=1", "chain.it2.fraction=1",
)  # fmt: skip


def command(base: Path, turns: tuple[str, ...], *launcher: str) -> list[str]:
    """Returns the arguments of `auricle pipeline` for all steps on the corpora of `write`."""
    preprocess = (f"corpus.path={base / 'speech'}", "min_shards=4", "report=false")
    given = {"preprocess": preprocess, "pretrain": (*HUBERT, *turns), "evaluate": quick(base / "tones")}
    given["targets"] = () if turns == TWO_TURNS else ("classes=8",)
    lines = [f"{step}.{line}" for step, overrides in given.items() for line in overrides]
    return ["pipeline", f"folder={base / 'whole'}", *launcher, *lines]


def write(base: Path) -> None:
    """Writes synthetic speech to train on and tones to evaluate on."""
    synthesise(base / "speech", 12)
    write_tones(base / "tones")


def names(turns: tuple[str, ...]) -> list[str]:
    """Returns the names of the run folders, in the order of their jobs."""
    training = ["toy-it1-labels", "toy-it1", "toy-it2-labels", "toy-it2"] if turns == TWO_TURNS else ["targets", "toy"]
    return ["preprocess", *training, "evaluate"]


def require_whole(base: Path, turns: tuple[str, ...], again: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Asserts that all results exist and that the same command skips all steps."""
    folder = base / "whole"
    rows = json.loads((folder / "evaluation" / "results.json").read_text())
    assert {row["task"] for row in rows} == {"keywords"}
    assert any(row["who"].startswith("toy") for row in rows), rows
    labels = "runs/toy-it2-labels/labels" if turns == TWO_TURNS else "labels"
    assert len(list((folder / labels).glob("*.parquet"))) == len(list((folder / "shards").glob("*.tar"))) > 0
    capsys.readouterr()
    assert main.main(again) == 0
    said = capsys.readouterr().out
    assert said.count("up to date, skipped") == len(names(turns)), said
