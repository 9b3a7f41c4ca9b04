"""Towers of `joint_embedding.py`: their config, training for some processor time, vectors and ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.prove.joint_embedding_data import ALPHABET, SIDE, Matrix, Sample, batch
from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.heads.joint_embedding import JointEmbedding
from pretrain.interfaces.frames import StepContext
from pretrain.lr_schedule import learning_rate
from pretrain.train_module import build_model

LONGEST = 1_000_000
"""More updates than any arm has time for."""


def tower(kind: str, dim: int, layers: int) -> dict[str, Any]:
    """Returns the config of a tower for text or images."""
    encoder = {
        "name": "transformer", "dim": dim, "layers": layers, "heads": 4, "ffn_dim": 2 * dim, "norm": "pre",
        "positions": "none", "dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0,
    }  # fmt: skip
    embedding = {
        "text": {"name": "tokens", "vocabulary": len(ALPHABET)},
        "image": {"name": "patches", "size": SIDE, "channels": 1, "patch": 2},
    }[kind]
    return {"embedding": embedding, "encoder": encoder}


def config(dim: int, layers: int, heads: Mapping[str, Any], seed: int, lr: float) -> Config:
    """Returns the config of a run; data are drawn here."""
    return load(
        Config,
        {
            "data": {"shards": "none", "micro_batches": 1},
            "frontend": {"name": "log_mel", "n_mels": 40, "dropout": 0.0},
            "encoder": {
                "name": "conformer", "dim": dim, "layers": layers, "heads": 4, "ffn_dim": 2 * dim, "kernel": 15,
                "dropout": 0.05, "attention_dropout": 0.0, "layer_drop": 0.0,
            },
            "objective": {"name": "none", "mask_time": 0.05, "mask_time_span": 8, "mask_channels": 0.05},
            "heads": dict(heads),
            "optimizer": {"lr": lr, "weight_decay": 0.01, "clip_norm": 1.0},
            "schedule": {"name": "cosine", "warmup_steps": 20},
            "engine": {"name": "torch"},
            "seed": seed,
        },
    )  # fmt: skip


def model(settings: Config) -> Engine:
    """Returns an engine with initial weights on this process's CPU."""
    return make_engine(settings, build_model(settings), DistributedContext())


def train(
    engine: Engine, settings: Config, drawn: Callable[[np.random.Generator, float], list[Sample]], minutes: float
) -> int:
    """Trains for some minutes of processor time, whatever else runs; returns the number of updates.

    The median time of the first updates determines it. drawn: gets the share of the updates that are done.
    """
    steps, step = LONGEST, 0
    seconds: list[float] = []
    while step < steps:
        began = time.process_time()
        samples = drawn(np.random.default_rng([settings.seed, step]), step / steps)
        if step == 12:
            steps = max(20, int(60 * minutes / float(np.median(seconds[2:]))))
        lr = learning_rate(settings.optimizer, settings.schedule, steps, step)
        result = engine.step([batch(samples)], StepContext(settings.seed, step), lr)
        seconds.append(time.process_time() - began)
        step += 1
        if step % 200 == 0:
            print(f"  update {step} of {steps}: loss {result.loss:.3f}", flush=True)
    return steps


@torch.no_grad()
def embedded(engine: Engine, kind: str, samples: Sequence[Sample]) -> Matrix:
    """Returns the unit vectors of samples, (N, E)."""
    module = engine.module.eval()
    head = module.heads["joint"]
    assert isinstance(head, JointEmbedding)
    parts = []
    for first in range(0, len(samples), 32):
        data = batch(samples[first : first + 32])
        encoded = module.model(data.wave_BT, data.lengths_B) if kind == "speech" else None
        parts.append(head.embed_speech(encoded) if encoded else head.embed(kind, data))
    module.train()
    return torch.cat(parts).numpy()


def ranks(similar: Matrix, right: Matrix | None = None) -> dict[str, float]:
    """Returns recall@1, 5 and 10 and the median rank. similar: (Q, N); right: the right column of each row."""
    right = np.arange(len(similar)) if right is None else right
    of_right = similar[np.arange(len(similar)), right]
    rank = 1 + (similar > of_right[:, None]).sum(1)
    return {f"@{k}": float((rank <= k).mean()) for k in (1, 5, 10)} | {
        "median rank": float(np.median(rank)),
        "candidates": similar.shape[1],
        "queries": len(similar),
    }
