"""A training step of the separation head beside Conv-TasNet of torchaudio, on the same mixtures.

    OMP_NUM_THREADS=1 python benchmarks/separation.py [--json benchmarks/results/separation_cpu.json]

Forward and backward pass in turn, the fastest of several rounds. Conv-TasNet is `conv_tasnet_base` of torchaudio (5 M
weights at 16 kHz) under its published loss, the SI-SNR of the best permutation. Above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.heads.separation import Config, build
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape
from pretrain.interfaces.objectives import HeadPlan
from pretrain.nn.separation import best_assignment, si_snr
from pretrain.profiling.processor import model_name

ROWS, SECONDS, DIM, RATE_HZ, ROUNDS = 4, 2.0, 256, 25.0, 3
CTX = StepContext(0, 0)


def mixtures() -> Batch:
    """Returns mixtures of two signals of noise."""
    parts_BST = 0.1 * torch.randn(ROWS, 2, int(SECONDS * SAMPLE_RATE))
    lengths_B = torch.full((ROWS,), parts_BST.shape[2])
    keys = tuple(f"mixture-{row}" for row in range(ROWS))
    return Batch(parts_BST.sum(1), lengths_B, keys, 0, sources_BST=parts_BST)


def head_step(batch: Batch, waveform: bool) -> tuple[Callable[[], None], int]:
    """Returns a training step of the head on random frames of an encoder, and its number of weights."""
    frames = int(SECONDS * RATE_HZ)
    encoded = EncoderOutput((torch.randn(ROWS, frames, DIM),), torch.full((ROWS,), frames), RATE_HZ)
    head = build(Config(waveform_from=0 if waveform else -1), ModelShape(DIM, 1, 80, 100.0, RATE_HZ))
    plan = HeadPlan(torch.tensor(2.0 * ROWS), torch.ones(ROWS, dtype=torch.bool))

    def step() -> None:
        head.zero_grad()
        head(encoded, batch, plan, CTX).total.backward()

    return step, sum(weight.numel() for weight in head.parameters())


def conv_tasnet_step(batch: Batch) -> tuple[Callable[[], None], int]:
    """Returns a training step of Conv-TasNet, and its number of weights."""
    from torchaudio.models import conv_tasnet_base

    model = conv_tasnet_base(2)

    def step() -> None:
        model.zero_grad()
        estimates_BST = model(batch.wave_BT[:, None])
        assert batch.sources_BST is not None
        best_assignment(-si_snr(estimates_BST[:, :, None], batch.sources_BST[:, None])).cost_B.sum().backward()

    return step, sum(weight.numel() for weight in model.parameters())


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    torch.manual_seed(0)
    batch = mixtures()
    works = {
        "head, magnitudes and clustering": head_step(batch, waveform=False),
        "head, waveforms": head_step(batch, waveform=True),
        "Conv-TasNet": conv_tasnet_step(batch),
    }
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, (step, _) in works.items():
            began = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - began)
    figures = {
        name: {"seconds": seconds, "weights": works[name][1], "times": best["Conv-TasNet"] / seconds}
        for name, seconds in best.items()
    }
    for name, row in figures.items():
        print(f"{name:32} {row['weights'] / 1e6:5.1f} M  {row['seconds']:6.2f} s  {row['times']:5.2f} x Conv-TasNet")
    if given.json:
        values = {"command": "OMP_NUM_THREADS=1 python benchmarks/separation.py", "machine": model_name()}
        values |= {"torch": torch.__version__, "audio_seconds": ROWS * SECONDS, "steps": figures}
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
