"""The process that `graph_timing.py` starts: runs one exported graph on noise, once per line of standard input.

It imports numpy and onnxruntime only, so that its memory is that of a program on a device. Usage:
python -m pretrain.profiling.timed_graph FOLDER SECONDS THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.interop.stream_program import GRAPHS, Stream, open_session

RATE = 16_000


def memory_mb(field: str) -> float:
    """Returns a field of /proc/self/status in MB; NaN where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:")), float("nan"))


class Whole:
    """A graph from whole recordings to features."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.session = open_session(folder / "model.onnx", threads)

    def run(self, wave_T: Any) -> float:
        """Encodes the recording; returns seconds to the first feature: all of the audio, and its computation."""
        begun = time.perf_counter()
        self.session.run(None, {"wave": wave_T[None]})
        return len(wave_T) / RATE + time.perf_counter() - begun


class Chunks:
    """A graph of one chunk, with states."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.stream = Stream(folder, threads)

    def run(self, wave_T: Any) -> float:
        """Encodes the recording by chunks; returns seconds to the first feature: one window and its computation."""
        about, first, begun = self.stream.about, 0.0, time.perf_counter()
        self.stream.reset()
        for _ in self.stream.push(wave_T):
            waited = (about["window_samples"] - about["zeros_before"]) / RATE
            first = first or waited + time.perf_counter() - begun
        return first


def main() -> None:
    folder, seconds, threads = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    bare = memory_mb("VmRSS")
    begun = time.perf_counter()
    streams = any((folder / name).is_file() for name in GRAPHS)
    graph = Chunks(folder, threads) if streams else Whole(folder, threads)
    load_ms = 1e3 * (time.perf_counter() - begun)
    wave_T = (0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))).astype(np.float32)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        first = graph.run(wave_T)
        answer = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "first_ms": 1e3 * first}
        answer |= {"load_ms": load_ms, "peak_mb": memory_mb("VmHWM"), "bare_mb": bare}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
