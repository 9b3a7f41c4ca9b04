"""Latency of a supernet's subnets on a device: whole subnets are measured, and a regression predicts the others.

Sums over blocks alone mislead: caches, and what precedes the blocks, change them. Features of the regression are the
sum of the blocks' own latencies, their number, their heads and their inner channels.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.checkpointing.weights import LoadedCheckpoint
from pretrain.compression.cut import cut_subnet
from pretrain.interfaces.subnets import Space, Subnet
from pretrain.interop.graph_export import write_graph
from pretrain.profiling.call_timing import time_in_turn
from pretrain.profiling.graph_timing import noise

MOST_ERROR = 0.05
"""Largest mean relative error of the regression on subnets that it was not fitted to."""
LEAST_SUBNETS = 8
RIDGE = 1e-5
"""Penalty, as a share of the features' mean square."""


def measured_subnets(space: Space, count: int, seed: int = 0) -> list[Subnet]:
    """Returns different subnets to measure: the largest, the smallest and drawn ones, `count` or all there are."""
    found = dict.fromkeys([space.largest, space.smallest])
    rng = keyed_rng(seed, "measured subnets")
    while len(found) < min(count, space.size):
        found[space.draw(rng)] = None
    return list(found)[:count]


def subnet_timings(
    found: LoadedCheckpoint, subnets: Sequence[Subnet], seconds: float = 10.0, runs: int = 30, threads: int = 1
) -> dict[str, Any]:
    """Measures whole subnets on this machine, from audio to features in onnxruntime, one run of each in turn.

    Args:
        found: the supernet.
        subnets: what to measure.
        seconds: audio of one run.
        runs: runs of each subnet, after two that are not counted.
        threads: intra-op threads.

    Returns:
        Plain values for JSON: `subnets`, rows of widths and a CallTiming in milliseconds; `noisy_subnets`.

    Raises:
        ConfigError: the run is no supernet, or cannot be exported.
    """
    wave_1T = (0.1 * np.random.default_rng(0).standard_normal((1, round(seconds * SAMPLE_RATE)))).astype(np.float32)
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        for number, subnet in enumerate(subnets):
            made, file = cut_subnet(found, subnet), Path(folder) / f"{number}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                write_graph(made.config, made.module.model, file)
            calls.append(functools.partial(open_session(file, threads).run, None, {"wave": wave_1T}))
        timings = time_in_turn(calls, runs)
    named = {str(subnet): timing[:2] for subnet, timing in zip(subnets, timings, strict=True)}
    rows = [[[list(pair) for pair in subnet], *timing] for subnet, timing in zip(subnets, timings, strict=True)]
    return {"subnets": rows, "noisy_subnets": noise(named)}


class LatencyModel:
    """Predicts the latency of subnets from a table of `auricle bench --table RUN --subnets N`.

    One thread: milliseconds of processor time; more threads: of the wall clock.

    Args:
        table: the content of the table.
        space: the subnets of the run.

    Raises:
        ConfigError: the table is of another run, has too few whole subnets, or lacks a width of the space.
    """

    def __init__(self, table: Mapping[str, Any], space: Space) -> None:
        try:
            column = 4 if table["threads"] == 1 else 2
            self.seconds = float(table["seconds"])
            self._blocks = {(int(row[0]), int(row[1])): float(row[column]) for row in table["rows"]}
            subnets: list[Subnet] = [tuple((h, f) for h, f in row[0]) for row in table["subnets"]]
            measured_N = np.array([float(row[column - 1]) for row in table["subnets"]])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            remedy = "make it by: auricle bench --table RUN --heads … --ffn … --subnets 40"
            raise ConfigError(f"--table: has no {error} as expected; {remedy}") from None
        absent = [(h, f) for h in space.heads for f in space.ffn if (h, f) not in self._blocks]
        if absent:
            raise ConfigError(f"--table: has no block of {absent[0][0]} heads and {absent[0][1]} inner channels")
        if foreign := [subnet for subnet in subnets if not space.holds(subnet)]:
            raise ConfigError(f"--table: {[*map(list, foreign[0])]} is no subnet of this run; measure this run")
        if len(subnets) < min(LEAST_SUBNETS, space.size):
            raise ConfigError(f"--table: has {len(subnets)} whole subnets, and {LEAST_SUBNETS} or more are needed")
        x_NF = np.array([self._features(subnet) for subnet in subnets])
        self._weights_F = _ridge(x_NF, measured_N)
        left_out_N = np.array([
            x_NF[n] @ _ridge(np.delete(x_NF, n, axis=0), np.delete(measured_N, n)) for n in range(len(x_NF))
        ])  # fmt: skip
        self.error = float(np.mean(np.abs(left_out_N - measured_N) / measured_N))
        """Mean relative error on subnets that were left out of the fit, one at a time."""

    def milliseconds(self, subnet: Subnet) -> float:
        """Returns the predicted latency of `seconds` of audio."""
        return float(self._features(subnet) @ self._weights_F)

    def real_time_factor(self, subnet: Subnet) -> float:
        """Returns the predicted seconds of computing per second of audio."""
        return self.milliseconds(subnet) / 1e3 / self.seconds

    def require_accurate(self) -> None:
        """Raises ConfigError where subnets that were left out are predicted with more than MOST_ERROR."""
        if not self.error <= MOST_ERROR:
            raise ConfigError(
                f"--table: subnets that were left out of the fit are predicted with a mean error of {self.error:.1%} "
                f"(allowed: {MOST_ERROR:.0%}); measure again without other load, with more --runs or --subnets"
            )

    def _features(self, subnet: Subnet) -> np.ndarray:
        blocks = sum(self._blocks[pair] for pair in subnet)
        return np.array([1.0, blocks, len(subnet), sum(h for h, _ in subnet), sum(f for _, f in subnet)], dtype=float)


def megabytes(found: LoadedCheckpoint, subnet: Subnet) -> float:
    """Returns the size of a subnet's weights in fp32, in millions of bytes."""
    encoder = found.module.model.encoder
    whole = sum(weight.numel() for weight in found.module.model.parameters())
    space = found.module.objective.space()
    assert space is not None
    removed = 0
    for number, block in enumerate(encoder.get_submodule("blocks").children()):
        if number >= len(subnet):
            removed += sum(weight.numel() for weight in block.parameters())
            continue
        heads, ffn = subnet[number]
        head = block.get_parameter("attention.qkv.weight").shape[0] // 3 // space.heads[-1]
        removed += (space.heads[-1] - heads) * head * (4 * encoder.dim + 3)
        removed += (space.ffn[-1] - ffn) * (2 * encoder.dim + 1) * space.parts
    return 4e-6 * (whole - removed)


def _ridge(x_NF: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Returns the weights of a ridge regression on relative errors; the first feature, a constant, has no penalty."""
    scale_F = x_NF.max(axis=0)
    relative_NF = x_NF / scale_F / y_N[:, None]
    penalty_F = np.full(x_NF.shape[1], RIDGE * float(np.square(relative_NF).sum()) / x_NF.shape[1])
    penalty_F[0] = 0.0
    solved = np.linalg.solve(relative_NF.T @ relative_NF + np.diag(penalty_F), relative_NF.sum(axis=0))
    weights_F: np.ndarray = solved / scale_F
    return weights_F
