"""Streams on one core: beside transformers' streaming encoder, many streams at once, and an hour through one stream.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py [--json benchmarks/results/streaming_cpu.json]

Encoders of 6 layers and 256 channels with random weights, pushes of 320 ms. Ours compute features from samples; the
time of transformers' encoder is without its features.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.inference.streaming_state import join, split
from pretrain.train_module import build_speech_model

PUSH = 5_120
"""Samples in 320 ms."""
SIZES = {"dim": 256, "layers": 6, "heads": 4, "ffn_dim": 1024, "attention": "chunked"}
CONFORMER = {"name": "conformer", "causal": True, "kernel": 9}
TRANSFORMER = {"name": "transformer", "positions": "rope", "norm": "pre"}


def streamed(encoder: dict[str, Any], subsampling: int) -> StreamedModel:
    """Returns a model with chunks of 320 ms and 5.8 s of left context."""
    chunk = 32 // subsampling
    values = {
        "data": {"shards": "none"},
        "frontend": {"name": "log_mel", "normalize": "fixed", "subsampling": subsampling},
        "encoder": SIZES | encoder | {"chunk_frames": [chunk], "left_chunks": [18]},
        "objective": {"name": "best_rq"},
    }
    return StreamedModel(build_speech_model(load(Config, values)))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50, p95 and the maximum in ms."""
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {"p50_ms": 1e3 * float(p50), "p95_ms": 1e3 * float(p95), "max_ms": 1e3 * max(seconds)}


class Ours:
    """Pushes of one stream."""

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.state = model, model.start()
        self.parameters = sum(p.numel() for p in model.model.parameters())

    def push(self) -> None:
        self.state, _ = self.model.push(self.state, 0.1 * torch.randn(PUSH))


class Theirs:
    """The same for transformers' NemotronAsrStreamingEncoder: 32 feature frames a push, left context of 70 frames."""

    def __init__(self) -> None:
        from transformers import NemotronAsrStreamingEncoder, NemotronAsrStreamingEncoderConfig

        config = NemotronAsrStreamingEncoderConfig(
            hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024
        )
        self.model = NemotronAsrStreamingEncoder(config).eval()
        self.kept: dict[str, Any] = {}
        self.parameters = sum(p.numel() for p in self.model.parameters())

    @torch.inference_mode()
    def push(self) -> None:
        features = torch.randn(1, 32, 80)
        out = self.model(features, use_cache=True, num_lookahead_tokens=3, **self.kept)
        self.kept = {"past_key_values": out.past_key_values, "padding_cache": out.padding_cache}


def side_by_side(rounds: int) -> dict[str, Any]:
    """Returns the time of pushes of each, in turn in the same run."""
    who: dict[str, Ours | Theirs] = {
        "auricle conformer, 12.5 Hz": Ours(streamed(CONFORMER, 8)),
        "auricle conformer, 25 Hz": Ours(streamed(CONFORMER, 4)),
        "auricle transformer, 25 Hz": Ours(streamed(TRANSFORMER, 4)),
    }
    try:
        who["transformers NemotronAsrStreamingEncoder, 12.5 Hz"] = Theirs()
    except ImportError:
        print("transformers has no NemotronAsrStreamingEncoder here: left out")
    times: dict[str, list[float]] = {name: [] for name in who}
    for turn in range(rounds + 25):  # the first ones fill the left context
        for name, one in who.items():
            began = time.perf_counter()
            one.push()
            if turn >= 25:
                times[name].append(time.perf_counter() - began)
    rows = {
        name: {"parameters": who[name].parameters, "rtf": float(np.median(times[name])) / 0.32} | quantiles(times[name])
        for name in who
    }
    theirs = rows.get("transformers NemotronAsrStreamingEncoder, 12.5 Hz")
    for row in rows.values():
        row["transformers_over_this"] = theirs["p50_ms"] / row["p50_ms"] if theirs else float("nan")
    return rows


def at_once(model: StreamedModel, n_streams: int, ticks: int) -> dict[str, float]:
    """Pushes 320 ms of each stream every tick; the latency of a push is that of the batch that it is part of."""
    states, seconds = [model.start() for _ in range(n_streams)], []
    for tick in range(ticks + 20):
        parts = [0.1 * torch.randn(PUSH) for _ in range(n_streams)]
        began = time.perf_counter()
        state, _ = model.push(join(states), parts)
        states = split(state)
        if tick >= 20:
            seconds.append(time.perf_counter() - began)
    return {"streams": n_streams, "share_of_real_time": float(np.mean(seconds)) / 0.32} | quantiles(seconds)


def an_hour(model: StreamedModel, minutes: int) -> dict[str, float]:
    """Returns memory of the process and size of the state after five minutes and at the end."""
    process, state, seconds = psutil.Process(), model.start(), []
    early: tuple[int, int] = (0, 0)
    for number in range(minutes * 60 * 16_000 // PUSH):
        began = time.perf_counter()
        state, _ = model.push(state, 0.1 * torch.randn(PUSH))
        seconds.append(time.perf_counter() - began)
        if number == 5 * 60 * 16_000 // PUSH:
            early = process.memory_info().rss, state.bytes
    memory = process.memory_info().rss
    return {
        "minutes": minutes,
        "rss_growth_mb": (memory - early[0]) / 2**20,
        "state_bytes_after_5_minutes": early[1],
        "state_bytes_at_the_end": state.bytes,
        "rtf": sum(seconds) / (60 * minutes),
    } | quantiles(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=int, default=60, help="of audio through one stream")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"push": side_by_side(150)}
    for name, row in found["push"].items():
        print(
            f"{name:52} {row['p50_ms']:6.1f} ms a push, p95 {row['p95_ms']:6.1f}, real-time factor {row['rtf']:.3f}, "
            f"transformers / this {row['transformers_over_this']:.2f}, {row['parameters'] / 1e6:.1f} M weights"
        )
    found["at_once"] = [at_once(streamed(CONFORMER, 4), n, 40) for n in (1, 10, 20, 40)]
    for row in found["at_once"]:
        print(
            f"{row['streams']:3} streams, conformer 25 Hz: {row['share_of_real_time']:.2f} of real time, "
            f"push p50 {row['p50_ms']:.0f} ms, p95 {row['p95_ms']:.0f} ms, max {row['max_ms']:.0f} ms"
        )
    found["hour"] = an_hour(streamed(CONFORMER, 4), given.minutes)
    print(
        f"{given.minutes} minutes through one stream: memory grew by {found['hour']['rss_growth_mb']:.1f} MB after the "
        f"fifth minute, the state has {found['hour']['state_bytes_at_the_end']:,} bytes, real-time factor "
        f"{found['hour']['rtf']:.3f}"
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
