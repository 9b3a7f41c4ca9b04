"""Measures what heads add to a training step: forward and backward pass and AdamW, with and without them.

    python benchmarks/heads.py --threads 2 --out benchmarks/results/heads_cpu.json

All variants of a model run in turn in every round, so that the load of the machine meets all alike; ratios are those
of the medians. `three heads` are CTC, a classifier of speakers and a reconstruction of the masked frames, on the
objective's own pass; `whole` gives CTC a pass without a mask, of the rows that have a text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_step import our_step
from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.profiling.processor import model_name
from pretrain.train_module import build_model

LIMIT = 1.25
"""Times the step without heads that three heads may take."""
SPEAKERS = tuple(f"speaker{number}" for number in range(100))
TEXT = "the quick brown fox jumps over the lazy dog and more"
CTC: dict[str, Any] = {"name": "ctc"}
WHO: dict[str, Any] = {"name": "classifier", "classes": list(SPEAKERS)}
MEL: dict[str, Any] = {"name": "reconstruction", "frames": "masked"}
DECODER = {"layers": 2, "heads": 4, "ffn_dim": 1024}
VARIANTS: dict[str, dict[str, Any]] = {
    "no heads": {},
    "three heads": {"text": CTC, "who": WHO, "mel": MEL},
    "three heads, whole": {"text": CTC | {"input": "whole"}, "who": WHO, "mel": MEL},
    "ctc": {"text": CTC},
    "classifier": {"who": WHO},
    "reconstruction": {"mel": MEL},
    "transducer": {"text": {"name": "transducer"}},
    "sequence": {"text": {"name": "sequence", "vocabulary": 1000, "decoder": DECODER}},
}
MODELS: dict[str, dict[str, Any]] = {
    "4 × 256": {
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer", "dim": 256, "layers": 4, "heads": 4, "ffn_dim": 1024, "positions": "rope"},
        "objective": {"name": "best_rq", "n_codes": 1024},
    },
    "12 × 768": {
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer", "positions": "rope"},
        "objective": {"name": "best_rq"},
    },
}


def audio(size: int, seconds: float, labelled: float) -> Batch:
    """Returns noise; a share of the rows has a text, tokens and a speaker."""
    wave_BT = 0.1 * torch.randn(size, int(seconds * 16_000), generator=torch.Generator().manual_seed(0))
    has = [row < max(1, round(labelled * size)) for row in range(size)]
    ids_BN = torch.full((size, 20), -1)
    ids_BN[: sum(has)] = torch.arange(20)
    labels = {"text": tuple(TEXT * one for one in has), "speaker": tuple(SPEAKERS[0] * one for one in has)}
    keys = tuple(f"utterance-{row}" for row in range(size))
    return Batch(wave_BT, torch.full((size,), wave_BT.shape[1]), keys, 0, labels=labels, tokens={"text": ids_BN})


def stepper(model: Mapping[str, Any], heads: Mapping[str, Any], batch: Batch) -> Callable[[int], float]:
    """Returns a function that makes one update."""
    return our_step(build_model(load(Config, dict(model) | {"data": {"shards": "none"}, "heads": dict(heads)})), batch)


def measure(model: str, names: list[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row per variant: median seconds of a step, elapsed and of the processor, and their ratios."""
    cases: dict[str, Callable[[int], float]] = {}
    for name in names:
        shares = (1.0, given.labelled) if "whole" in name else (1.0,)
        for share in shares:
            batch = audio(given.batch, given.seconds, share)
            shown = name if share == 1 else f"{name}, {share:.0%} of the rows labelled"
            cases[shown] = stepper(MODELS[model], VARIANTS[name], batch)
    elapsed: dict[str, list[float]] = {name: [] for name in cases}
    used: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(1 + given.steps):
        for name, step in cases.items():
            began, cpu = time.perf_counter(), time.process_time()
            step(number)
            if number:
                elapsed[name].append(time.perf_counter() - began)
                used[name].append(time.process_time() - cpu)
    rows = []
    for name in cases:
        row: dict[str, Any] = {"model": model, "variant": name}
        for key, values in (("elapsed", elapsed), ("cpu", used)):
            row[f"{key}_s"] = round(statistics.median(values[name]), 4)
            row[f"{key}_ratio"] = round(statistics.median(values[name]) / statistics.median(values["no heads"]), 3)
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def main() -> int:
    """Returns exit code 1 where three heads on the objective's pass exceed the limit, in processor time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--labelled", type=float, default=0.25, help="share of rows with labels, in a further row")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load_before = os.getloadavg()[0]
    rows = []
    for model in given.models:
        names = list(VARIANTS) if model == next(iter(MODELS)) else ["no heads", "three heads", "three heads, whole"]
        rows += measure(model, names, given)
    if given.out:
        values = {
            "command": " ".join(["python benchmarks/heads.py", *sys.argv[1:]]),
            "machine": f"{model_name()}, {given.threads} threads of {os.cpu_count()}",
            "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
            "torch": torch.__version__,
            "audio": f"{given.batch} × {given.seconds:g} s",
            "rows": rows,
        }
        given.out.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(row["cpu_ratio"] > LIMIT for row in rows if row["variant"] == "three heads"))


if __name__ == "__main__":
    sys.exit(main())
