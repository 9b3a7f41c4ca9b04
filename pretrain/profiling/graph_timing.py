"""Speed, memory and size of exported graphs on this machine, measured in turn so that a change of load hits all alike.

Each graph runs in a process of its own, with numpy and onnxruntime only, as on a device.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import ConfigError
from pretrain.interop.stream_program import GRAPHS

FILES = {"features.json": "model.onnx"} | GRAPHS
"""Description -> graph, for each kind of folder that `auricle export` writes."""
SPREAD = 1.5
"""Ratio of the 95th percentile to the median above which timings are noisy."""


@dataclass(frozen=True)
class GraphTiming:
    """Figures of one graph. Real-time factors are seconds of computing per second of audio."""

    name: str
    rtf_p50: float
    rtf_p95: float
    cpu_rtf: float
    """Processor time per second of audio, the median."""
    first_output_ms: float
    """From the first sample to the first feature: the audio that is waited for, and its computation."""
    load_ms: float
    peak_rss_mb: float
    bare_rss_mb: float
    """Memory of Python with numpy before onnxruntime is imported; part of the peak."""
    file_mb: float


@dataclass(frozen=True)
class Timings:
    """Figures of all graphs.  noisy: why they cannot be trusted; empty: nothing was noticed."""

    graphs: tuple[GraphTiming, ...]
    seconds: float
    threads: int
    noisy: str


def measure_graphs(folders: Sequence[Path], seconds: float = 10.0, runs: int = 30, threads: int = 1) -> Timings:
    """Measures exported graphs, one run of each in turn.

    Args:
        folders: folders of `auricle export --to onnx`, `onnx_stream` or `edge`.
        seconds: audio of one run.
        runs: runs of each graph, after two that are not counted.
        threads: intra-op threads.

    Raises:
        ConfigError: a folder is not such an export, or its graph does not run.
    """
    for folder in folders:
        if not any((folder / name).is_file() for name in FILES):
            raise ConfigError(f"{folder}: not a folder of `auricle export --to onnx`, `onnx_stream` or `edge`")
    workers = [_Worker(folder, seconds, threads) for folder in folders]
    load_before = os.getloadavg()[0]
    try:
        for worker in workers:
            worker.warm()
        for _ in range(runs):
            for worker in workers:
                worker.run()
        graphs = tuple(worker.figures() for worker in workers)
    finally:
        for worker in workers:
            worker.close()
    figures = {graph.name: (graph.rtf_p50, graph.rtf_p95) for graph in graphs}
    return Timings(graphs, seconds, threads, noise(figures, load_before))


def noise(figures: Mapping[str, tuple[float, float]], load: float = 0.0) -> str:
    """Returns why timings cannot be trusted; "" if nothing was noticed.

    Args:
        figures: median and 95th percentile of each thing that was timed.
        load: load of the machine before; the present load counts as well.
    """
    cores, load = os.cpu_count() or 1, max(load, os.getloadavg()[0])
    if load > cores:
        return f"load {load:.1f} on {cores} cores"
    wide = [name for name, (median, p95) in figures.items() if p95 > SPREAD * median]
    return f"the 95th percentile of {', '.join(wide)} is more than {SPREAD} times the median" if wide else ""


def median_and_p95(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the 95th percentile (nearest rank)."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]


class _Worker:
    """A process that runs one graph on request; one JSON line per answer."""

    def __init__(self, folder: Path, seconds: float, threads: int) -> None:
        self.folder, self.seconds = folder, seconds
        self.answers: list[dict[str, Any]] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.profiling.timed_graph", str(folder), str(seconds), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment,
        )  # fmt: skip

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            lines = self.process.stderr.read().strip().splitlines()
            raise ConfigError(f"{self.folder}: the graph does not run: {lines[-1] if lines else 'no message'}"[:400])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def warm(self) -> None:
        for _ in range(2):
            self.ask()

    def run(self) -> None:
        self.answers.append(self.ask())

    def figures(self) -> GraphTiming:
        rtf_p50, rtf_p95 = median_and_p95([answer["wall_s"] / self.seconds for answer in self.answers])
        last = self.answers[-1]
        graph = next(self.folder / graph for name, graph in FILES.items() if (self.folder / name).is_file())
        return GraphTiming(
            name=self.folder.name,
            rtf_p50=rtf_p50,
            rtf_p95=rtf_p95,
            cpu_rtf=statistics.median(answer["cpu_s"] / self.seconds for answer in self.answers),
            first_output_ms=statistics.median(answer["first_ms"] for answer in self.answers),
            load_ms=last["load_ms"],
            peak_rss_mb=last["peak_mb"],
            bare_rss_mb=last["bare_mb"],
            file_mb=graph.stat().st_size / 1e6,
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
