"""Compares the cost model of `auricle plan-run` with every measured row in benchmarks/results; writes cost_model.md.

    python benchmarks/cost_model.py

Operations: forecast against those counted in the step. Time: each row's step forecast at the median rate, in operations
per second, of the other rows of its file and precision.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_step import RECIPES, ours, speech_batch, step_flops
from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.profiling import cost_model

RESULTS = Path(__file__).resolve().parent / "results"


def forecast_gflop(recipe: str, seconds: float) -> float:
    """Returns the forecast of a training step's operations per second of audio, in units of 10⁹."""
    values = RECIPES[recipe] | {"data": {"shards": "none"}, "engine": {"precision": "bf16"}}
    measured = cost_model.measure(load(Config, values))
    return cost_model.step_flops(measured, seconds) / seconds / 1e9


def counted_gflop(recipe: str, rows: int, seconds: float) -> float:
    """Returns the operations that a training step runs per second of audio, in units of 10⁹."""
    module = ours(recipe, "bf16", "cpu")
    return step_flops(module, speech_batch(rows, seconds, "cpu")) / (rows * seconds) / 1e9


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Returns a result file's rows of single models of ours, with forecast and errors."""
    found = json.loads(path.read_text(encoding="utf-8"))
    found = found.get("recipes", found)
    rows = [row for row in found.get("rows", ()) if str(row.get("model", "")).removeprefix("ours ") in RECIPES]
    for row in rows:
        row["forecast"] = forecast_gflop(row["model"].removeprefix("ours "), found["seconds"])
        row["gflop_per_audio_s"] = counted_gflop(row["model"].removeprefix("ours "), found["batch"], found["seconds"])
        row["error"] = row["forecast"] / row["gflop_per_audio_s"] - 1
    for row in rows:
        peers = [r for r in rows if r["precision"] == row["precision"] and r is not row]
        if peers:
            rate = statistics.median(r["audio_s_per_s"] * r["forecast"] for r in peers)
            row["time_error"] = row["audio_s_per_s"] * row["forecast"] / rate - 1
    return rows


def main() -> None:
    """Prints and writes the table."""
    lines = ["# Cost model against measured steps", "", "`python benchmarks/cost_model.py`", ""]
    lines += [
        "Not forecast: the teacher of `efficient_base` after relabelling (a fifth more operations), compiled rows.",
        "",
    ]
    lines += ["| file | model | precision | GFLOP/audio s | forecast | error | step time, error |", "|" + " --- |" * 7]
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith(("train_step", "gpu")):
            for row in rows_of(path):
                time_error = f"{row['time_error']:+.0%}" if "time_error" in row else ""
                lines.append(
                    f"| {path.name} | {row['model']} | {row['precision']} | {row['gflop_per_audio_s']:.1f} | "
                    f"{row['forecast']:.1f} | {row['error']:+.1%} | {time_error} |"
                )
                print(lines[-1], flush=True)
    (RESULTS / "cost_model.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
