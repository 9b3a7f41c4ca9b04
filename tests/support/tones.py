"""A corpus that a probe can learn in seconds: tones of three pitches by six speakers, with an alignment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

PITCHES = {"low": 200.0, "middle": 600.0, "high": 1800.0}


def write_tones(folder: Path) -> Path:
    """Writes manifest.tsv, phones.tsv and the audio; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["path\tspeaker\ttext\tlabel\tlanguage\tcorpus\tsplit"]
    phones = ["path\tstart_s\tend_s\tphone"]
    for s in range(6):
        for label, pitch in PITCHES.items():
            for take in range(3):
                name = f"{s}-{label}-{take}.wav"
                time = np.arange(9600) / 16000
                tone = np.sin(2 * np.pi * pitch * (1 + 0.02 * s) * time) * (time > 0.2)
                soundfile.write(folder / name, 0.2 * tone + 0.01 * rng.standard_normal(9600), 16000)
                split = ("train", "train", "train", "valid", "test", "test")[s]
                lines.append(f"{name}\tspeaker{s}\t{label}\t{label}\ten\ttones\t{split}")
                phones += [f"{name}\t0.0\t0.2\tSIL", f"{name}\t0.2\t0.6\t{label}"]
    (folder / "manifest.tsv").write_text("\n".join(lines))
    (folder / "phones.tsv").write_text("\n".join(phones))
    return folder


def quick(folder: Path) -> tuple[str, ...]:
    """Returns overrides of `auricle evaluate` that take seconds on this corpus."""
    return (
        *("task=keywords", "corpora=tones", "seeds=1", "bootstrap=100", "supervised.epochs=0", "neural.epochs=0"),
        *(f"manifest={folder / 'manifest.tsv'}", "phones=phones.tsv"),
    )
