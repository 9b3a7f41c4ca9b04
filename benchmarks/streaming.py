"""Streams on one core: beside other libraries, many streams at once, and an hour through one stream.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py [--json benchmarks/results/streaming_cpu.json] [--parts push,hour]
    OMP_NUM_THREADS=1 python benchmarks/streaming.py --parts recogniser --checkpoint runs/streaming/runs/recogniser

Encoders of 6 layers and 256 channels with random weights, pushes of 320 ms. Ours compute features from samples; the
time of transformers' encoder is without its features. `runtimes` compares one recogniser in PyTorch, in the exported
graph's program, and in sherpa-onnx's runtime where that is installed (pip install sherpa-onnx). `recogniser` sends an
hour of real speech (AURICLE_SPEECH) through one stream of a trained recogniser, text included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sherpa_stream import RATE, SherpaStream, write_graph
from data_pipeline.core.schema import load
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.evaluate.manifest import find_manifest, read_audio, read_manifest
from pretrain.heads import ctc
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.inference.streaming_state import join, split
from pretrain.interop import stream_program
from pretrain.interop.stream_export import export_stream
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.recogniser import Recogniser, open_recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from pretrain.train_module import build_speech_model

PUSH = 5_120
"""Samples in 320 ms."""
SIZES = {"dim": 256, "layers": 6, "heads": 4, "ffn_dim": 1024, "attention": "chunked"}
CONFORMER = {"name": "conformer", "causal": True, "kernel": 9}
TRANSFORMER = {"name": "transformer", "positions": "rope", "norm": "pre"}


def config(encoder: dict[str, Any], subsampling: int, chunk: int) -> Config:
    """Returns the config of a model with 18 chunks of left context."""
    values = {
        "data": {"shards": "none"},
        "frontend": {"name": "log_mel", "normalize": "fixed", "subsampling": subsampling},
        "encoder": SIZES | encoder | {"chunk_frames": [chunk], "left_chunks": [18]},
        "objective": {"name": "best_rq"},
    }
    return load(Config, values)


def streamed(encoder: dict[str, Any], subsampling: int) -> StreamedModel:
    """Returns a model with chunks of 320 ms and 5.8 s of left context."""
    return StreamedModel(build_speech_model(config(encoder, subsampling, 32 // subsampling)))


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


def runtimes(encoder: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Returns the time of pushes of 300 ms of one recogniser at 50 Hz, greedy decoding included, in turn in one run.

    Without positions, since sherpa-onnx's ONNX Runtime has no cosine of doubles.
    """
    settings = config(encoder | {"positions": "none"}, subsampling=2, chunk=15)
    model = build_speech_model(settings)
    head = ctc.build(load(ctc.Config, {"name": "ctc"}), model.shape).eval()
    recogniser = StreamingRecogniser(Recogniser(model, head, "random"))
    state = recogniser.start()

    def ours(wave_T: np.ndarray) -> None:
        nonlocal state
        state, _ = recogniser.push(state, [torch.from_numpy(wave_T)])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_stream(settings, model, folder / "graph", head=head)
        stream, text = stream_program.Stream(folder / "graph"), stream_program.Text(list(head.symbols))

        def program(wave_T: np.ndarray) -> None:
            for found in stream.push(wave_T):
                text.add(found["log_probs"])

        who: dict[str, tuple[int, Callable[[np.ndarray], None]]] = {
            "auricle, PyTorch": (SAMPLE_RATE, ours),
            "auricle's onnx_stream, its run.py": (SAMPLE_RATE, program),
        }
        try:
            write_graph(recogniser.model, head, folder)
            who["the same model in sherpa-onnx"] = RATE, SherpaStream(folder).push
        except ImportError:
            print("sherpa-onnx is not installed: left out")
        times: dict[str, list[float]] = {name: [] for name in who}
        rng = np.random.default_rng(0)
        for turn in range(rounds + 25):
            for name, (rate, push) in who.items():
                wave_T = (0.1 * rng.standard_normal(rate * 3 // 10)).astype(np.float32)
                began = time.perf_counter()
                push(wave_T)
                if turn >= 25:
                    times[name].append(time.perf_counter() - began)
    ours_p50 = float(np.median(times["auricle, PyTorch"]))
    return {
        name: {"rtf": float(np.median(found)) / 0.3, "over_pytorch": float(np.median(found)) / ours_p50}
        | quantiles(found)
        for name, found in times.items()
    }


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


def an_hour_of_text(checkpoint: str, minutes: int) -> dict[str, Any]:
    """Streams transcribed speech through a recogniser with rescored beams; returns memory after each 5 minutes."""
    recogniser = StreamingRecogniser(open_recogniser(checkpoint, "ctc"), DecodingConfig(decoder="rescoring", beam=4))
    spoken = [u for u in read_manifest(find_manifest("")) if u.text and u.split == "test"]
    process, state, seconds, words, segments = psutil.Process(), recogniser.start(), 0.0, 0, 0
    memory: list[dict[str, float]] = []
    largest, busy = 0, 0.0
    for utterance in itertools.cycle(spoken):
        for part_T in torch.from_numpy(read_audio(utterance)).split(PUSH):
            began = time.perf_counter()
            state, [update] = recogniser.push(state, [part_T])
            busy, seconds = busy + time.perf_counter() - began, seconds + len(part_T) / SAMPLE_RATE
            words, segments, largest = words + len(update.words), segments + update.ended, max(largest, state.bytes)
        if seconds >= 300 * (len(memory) + 1):
            memory.append(
                {"minutes": seconds / 60, "rss_mb": process.memory_info().rss / 2**20, "state_bytes": largest}
            )
            largest = 0
        if seconds >= 60 * minutes:
            break
    return {
        "decoder": "rescoring, beam 4", "words": words, "segments": segments, "rtf": busy / seconds,
        "rss_growth_mb": memory[-1]["rss_mb"] - memory[0]["rss_mb"], "every_5_minutes": memory,
    }  # fmt: skip


PARTS = ("push", "runtimes", "at_once", "hour", "recogniser")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results; parts that are not measured stay as they are in the file")
    parser.add_argument("--checkpoint", default="", help="trained recogniser for the part `recogniser`")
    parser.add_argument("--minutes", type=int, default=60, help="of audio through one stream")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"parts to measure (default: {','.join(PARTS)})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [part for part in given.parts.split(",") if part != "recogniser" or given.checkpoint]
    found: dict[str, Any] = json.loads(given.json.read_bytes()) if given.json and given.json.is_file() else {}
    if "push" in parts:
        found["push"] = side_by_side(150)
        for name, row in found["push"].items():
            print(
                f"{name:52} {row['p50_ms']:6.1f} ms a push, p95 {row['p95_ms']:6.1f}, real-time factor "
                f"{row['rtf']:.3f}, transformers / this {row['transformers_over_this']:.2f}, "
                f"{row['parameters'] / 1e6:.1f} M weights"
            )
    if "runtimes" in parts:
        found["runtimes"] = {"conformer": runtimes(CONFORMER, 100), "transformer": runtimes(TRANSFORMER, 100)}
        for encoder, rows in found["runtimes"].items():
            for name, row in rows.items():
                print(
                    f"{encoder:12} {name:36} {row['p50_ms']:6.1f} ms a push of 300 ms, p95 {row['p95_ms']:6.1f}, "
                    f"real-time factor {row['rtf']:.3f}, {row['over_pytorch']:.2f} of PyTorch's time"
                )
    if "at_once" in parts:
        found["at_once"] = [at_once(streamed(CONFORMER, 4), n, 40) for n in (1, 10, 20, 40)]
        for row in found["at_once"]:
            print(
                f"{row['streams']:3} streams, conformer 25 Hz: {row['share_of_real_time']:.2f} of real time, "
                f"push p50 {row['p50_ms']:.0f} ms, p95 {row['p95_ms']:.0f} ms, max {row['max_ms']:.0f} ms"
            )
    if "hour" in parts:
        found["hour"] = an_hour(streamed(CONFORMER, 4), given.minutes)
        print(
            f"{given.minutes} minutes through one stream: memory grew by {found['hour']['rss_growth_mb']:.1f} MB after "
            f"the fifth minute, the state has {found['hour']['state_bytes_at_the_end']:,} bytes, real-time factor "
            f"{found['hour']['rtf']:.3f}"
        )
    if "recogniser" in parts:
        found["recogniser"] = row = an_hour_of_text(given.checkpoint, given.minutes)
        print(
            f"{given.minutes} minutes through one recogniser ({row['decoder']}): {row['words']:,} words in "
            f"{row['segments']:,} segments, memory grew by {row['rss_growth_mb']:.1f} MB after the fifth minute, "
            f"real-time factor {row['rtf']:.3f}"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
