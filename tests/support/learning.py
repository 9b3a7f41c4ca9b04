"""Tiny trainings whose curves have committed bands: `python -m tests.support.learning` rewrites them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from launch.runs import bands
from tests.support.training import config, run

BANDS = Path(__file__).resolve().parent / "bands"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "best_rq": {"name": "best_rq", "n_codes": 32},
    "wav2vec2": {"name": "wav2vec2", "n_codes": 16, "code_dim": 16, "projection_dim": 16, "negatives": 10},
}
"""Objectives with a band, and their configs."""
SEEDS, STEPS = (0, 1, 2, 3, 4), 40


def learn(objective: str, folder: Path, seed: int, lr: float = 3e-3) -> Path:
    """Trains STEPS updates on synthetic speech; returns the run folder."""
    settings = config(
        STEPS,
        seed=seed,
        objective=OBJECTIVES[objective],
        optimizer={"lr": lr},
        train={"steps": STEPS, "checkpoint_every": STEPS, "keep_last": 1, "media_every": 0, "log_every": 1},
        health={"on_collapse": "warn"},
    )
    run(folder, settings)
    return folder


def main() -> None:
    """Writes the band of every objective."""
    for objective in OBJECTIVES:
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
