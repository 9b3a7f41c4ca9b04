"""Tiny trainings whose curves have committed bands: `python -m tests.support.learning [OBJECTIVE…]` rewrites them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.runs import bands
from tests.support.training import config, run

BANDS = Path(__file__).resolve().parent / "bands"
NEVER_RELABELS: dict[str, Any] = {"relabel_step": 1_000, "relabel_layer": 1}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "best_rq": {"name": "best_rq", "n_codes": 32},
    "wav2vec2": {"name": "wav2vec2", "n_codes": 16, "code_dim": 16, "projection_dim": 16, "negatives": 10},
    "hubert": {"name": "hubert", "units": 16, **NEVER_RELABELS},
    "wavlm": {"name": "wavlm", "units": 16, **NEVER_RELABELS},
    "efficient": {"name": "efficient", "units": 16, "predict_layers": [1, 2], **NEVER_RELABELS},
    "data2vec": {"name": "data2vec", "top_layers": 2},
    "data2vec2": {"name": "data2vec2", "top_layers": 2},
    "dinosr": {"name": "dinosr", "n_codes": 16, "top_layers": 2},
    "time_contrastive": {"name": "time_contrastive", "clusters": 8, "projection_dim": 16, "negatives": 10},
}
"""Every objective of its own that the tiny recipes train, with a config as small as its model."""
SEEDS, STEPS, AVERAGED = (0, 1, 2, 3, 4), 90, 15
"""AVERAGED: updates of a point of a curve; single updates differ more than learning from not learning."""


def learn(objective: str, folder: Path, seed: int, lr: float = 3e-3) -> Path:
    """Trains STEPS updates on synthetic speech; returns the run folder."""
    settings = config(
        STEPS,
        seed=seed,
        objective=OBJECTIVES[objective],
        optimizer={"lr": lr},
        train={"steps": STEPS, "checkpoint_every": STEPS, "keep_last": 1, "media_every": 0, "log_every": AVERAGED},
        health={"on_collapse": "warn"},
    )
    run(folder, settings)
    return folder


def main() -> None:
    """Writes the band of the objectives that are named, of all if none is."""
    for objective in sys.argv[1:] or OBJECTIVES:
        with tempfile.TemporaryDirectory() as work:
            runs = [learn(objective, Path(work) / str(seed), seed) for seed in SEEDS]
            found = bands.measure(objective, "python -m tests.support.learning", SEEDS, runs)
        bands.write(found, BANDS / f"{objective}.json")
        for name, one in found.curves.items():
            print(
                f"{objective}, {name}: {one.mean[0]:.3f} → {one.mean[-1]:.3f}, {one.low[-1]:.3f} … {one.high[-1]:.3f}"
            )


if __name__ == "__main__":
    main()
