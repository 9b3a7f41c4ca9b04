"""The tiny recipes learn from real speech when run by command on two ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from data_pipeline.core.jsonl import read_rows
from tests.support.paths import ROOT


@pytest.mark.slow
def test_wav2vec2_tiny_improves_on_chance_without_codebook_collapse(real_speech: Path, tmp_path: Path) -> None:
    def auricle(*arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "launch.main", *arguments], check=True, env=environment, cwd=tmp_path)

    auricle(
        "preprocess",
        "corpus=manifest",
        f"corpus.path={real_speech / 'manifest.tsv'}",
        "corpus.splits=[pretrain,train]",
        f"out={tmp_path / 'shards'}",
    )
    auricle(
        "pretrain", "+experiment=wav2vec2_tiny", f"data.shards={tmp_path / 'shards'}", f"runs={tmp_path}",
        "name=tiny", "launcher=local", "launcher.processes=2", "train.steps=160",
    )  # fmt: skip
    rows = read_rows(tmp_path / "tiny" / "metrics.jsonl")
    last = rows[-20:]
    assert mean(row["loss/contrastive"] for row in rows[20:40]) > math.log(101) - 0.1, (
        "the first losses must be at chance level"
    )
    assert mean(row["loss/contrastive"] for row in last) < math.log(101) - 0.1
    assert mean(row["metric/perplexity"] for row in last) > 40, (
        "a collapsed codebook has a much lower perplexity, of at most 128"
    )
