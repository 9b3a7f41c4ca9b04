"""The process that `timing.py` starts: runs one exported graph on noise, once per line of standard input.

It imports numpy and onnxruntime only, so that its memory is that of a program on a device. Usage:
python timed_graph.py FOLDER SECONDS THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000


def memory_mb(field: str) -> float:
    """Returns a field of /proc/self/status in MB; NaN where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:")), float("nan"))


def opened(file: Path, threads: int) -> Any:
    """Returns a session on the CPU with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Whole:
    """A graph from whole recordings to features."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.session = opened(folder / "model.onnx", threads)

    def run(self, wave_T: Any) -> float:
        """Encodes the recording; returns seconds to the first feature: all of the audio, and its computation."""
        begun = time.perf_counter()
        self.session.run(None, {"wave": wave_T[None]})
        return len(wave_T) / RATE + time.perf_counter() - begun


class Stream:
    """A graph of one chunk, with states."""

    def __init__(self, folder: Path, about: dict[str, Any], graph: str, threads: int) -> None:
        self.about, self.session = about, opened(folder / graph, threads)
        self.used = {given.name for given in self.session.get_inputs()}
        self.made = [output.name for output in self.session.get_outputs()]

    def run(self, wave_T: Any) -> float:
        """Encodes the recording by chunks; returns seconds to the first feature: one window and its computation."""
        about, first = self.about, 0.0
        window, advance = about["window_samples"], about["advance_samples"]
        states = {name: np.zeros((1, *shape), np.float32) for name, shape in about["states"].items()}
        pending, frames = np.concatenate([np.zeros(about["zeros_before"], np.float32), wave_T]), 0
        for start in range(0, len(pending) - window + 1, advance):
            begun = time.perf_counter()
            given = {"wave": pending[None, start : start + window], "samples": np.array([window])} | states
            given["frames"] = np.array([frames])
            values = self.session.run(self.made, {name: given[name] for name in self.used})
            found = dict(zip(self.made, values, strict=True))
            states = {name: found[f"next_{name}"] for name in states}
            frames += int(found["lengths"][0])
            first = first or (window - about["zeros_before"]) / RATE + time.perf_counter() - begun
        return first


def main() -> None:
    folder, seconds, threads = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    bare = memory_mb("VmRSS")
    begun = time.perf_counter()
    graph: Whole | Stream
    for name, file in (("stream.json", "stream.onnx"), ("edge.json", "model.onnx")):
        if (folder / name).is_file():
            about = json.loads((folder / name).read_text(encoding="utf-8"))
            graph = Stream(folder, about, file, threads)
            break
    else:
        graph = Whole(folder, threads)
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
