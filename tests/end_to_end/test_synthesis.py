"""From recordings with texts to a voice: preprocess, tokens, targets, pretrain, speak, evaluate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from data_pipeline.core.jsonl import read_rows
from tests.support.contract_cases import speech_like


def auricle(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "auricle", *arguments], cwd=folder, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, (arguments, done.stdout[-1500:], done.stderr[-3000:])


@pytest.mark.slow
def test_recordings_with_texts_become_a_voice(tmp_path: Path) -> None:
    pytest.importorskip("swift_f0")
    rows = []
    for number in range(12):
        text = ("go on", "a tool", "and on")[number % 3]
        soundfile.write(tmp_path / f"{number}.wav", speech_like(1.0 + 0.1 * number, number).numpy(), 16_000)
        rows.append({"path": f"{number}.wav", "speaker": "ann", "text": text, "corpus": "made"})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    auricle(tmp_path, "preprocess", "corpus=manifest", "corpus.path=list.jsonl", "out=shards", "min_shards=1")
    auricle(tmp_path, "tokens", "shards=shards", "out=tokens", 'symbols=" \'abcdefghijklmnopqrstuvwxyz"')
    auricle(tmp_path, "targets", "shards=shards", "out=pitch", "features=pitch")
    auricle(
        tmp_path, "pretrain", "+experiment=synthesis_tiny", "data.shards=shards", "data.tokens.text=tokens",
        "data.targets.pitch=pitch", "engine.name=torch", "train.steps=3", "schedule.warmup_steps=1", "data.workers=0",
        "train.media_every=1", "data.batch_seconds=8", "data.max_seconds=4",
    )  # fmt: skip
    metrics = read_rows(tmp_path / "runs" / "synthesis_tiny" / "metrics.jsonl")
    for part in ("mel", "alignment", "duration", "pitch", "energy", "waveform"):
        assert metrics[-1][f"metric/voice/{part}"] > 0
    auricle(tmp_path, "speak", "checkpoint=runs/synthesis_tiny", "text=go on and on", "out=a.wav", "pitch=2")
    assert soundfile.info(tmp_path / "a.wav").frames > 1_600
