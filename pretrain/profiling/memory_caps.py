"""Finds batch caps (`auricle data find-caps`) with training steps of increasing size on the actual device."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import build_model

SHARE_OF_MEMORY = 0.9


def measure_caps(config: Config, world: DistributedContext, memory_gb: float = 0.0) -> Caps:
    """Measures the batch caps of `config` on this device.

    The measurement holds the whole optimizer state on one rank, so that runs with ZeRO have memory to spare.

    Args:
        config: the config of the run.
        world: a single rank.
        memory_gb: memory that may be used, in GB; 0: SHARE_OF_MEMORY of the device's.

    Raises:
        ValueError: not even one segment of data.max_seconds fits.
    """
    alone = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="torch", offload="none"))
    engine = make_engine(alone, build_model(alone), world)
    budget = memory_gb * 1e9 or SHARE_OF_MEMORY * _memory(world)
    data = config.data
    lengths = sorted({data.max_seconds, (data.max_seconds * data.min_seconds) ** 0.5, max(data.min_seconds, 0.1)})

    def fits(rows: int, seconds: float) -> bool:
        peak = _peak(engine, rows, seconds)
        print(f"{rows} segments of {seconds:.2f} s: {peak / 1e9:.2f} of {budget / 1e9:.2f} GB", file=sys.stderr)
        return peak <= budget

    fits(1, data.max_seconds)  # allocates gradients and moments, which every later step has
    return find_caps(fits, lengths, data.batch_seconds / data.micro_batches)


def _peak(engine: Engine, rows: int, seconds: float) -> float:
    """Returns the peak memory of a training step in bytes; inf if memory ran out."""
    device, samples = engine.world.device, round(seconds * SAMPLE_RATE)
    noise = torch.from_numpy(keyed_rng(rows, samples).standard_normal(samples)).float() * 0.1
    wave_BT = noise.expand(rows, samples).clone()
    keys = tuple(f"cap{i}" for i in range(rows))
    batch = Batch(wave_BT, torch.full((rows,), samples), keys, 0)
    _reset(device)
    try:
        engine.step([batch], StepContext(0, 0), 0.0)
    except (torch.OutOfMemoryError, MemoryError):
        return float("inf")
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return float("inf")
    finally:
        engine.module.zero_grad(set_to_none=False)
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_reserved(device))
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _reset(device: str) -> None:
    """Resets the peak memory statistics."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _memory(world: DistributedContext) -> float:
    if world.device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return float(psutil.virtual_memory().available)


GAP = 0.05


MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Caps:
    """rows: (seconds of a segment, most rows that fit), longest first. cap_seconds, cap_quadratic: see DataConfig."""

    rows: Sequence[tuple[float, int]]
    cap_seconds: float
    cap_quadratic: float


def most_rows(fits: Callable[[int], bool], start: int) -> int:
    """Returns the most rows for which `fits`, to within 5 % (never too many), by doubling or halving and bisection."""
    good, bad, rows = 0, 0, max(1, start)
    while not (good and bad) and good < MOST_ROWS:
        if fits(rows):
            good, rows = rows, rows * 2
        else:
            bad, rows = rows, rows // 2
            if rows == 0:
                return 0
    while bad and bad - good > max(1, GAP * bad):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def find_caps(fits: Callable[[int, float], bool], lengths: Sequence[float], start_seconds: float) -> Caps:
    """Finds the most rows that fit at each length, by bisection.

    Args:
        fits: (rows, seconds) -> whether a training step of this size fits.
        lengths: segment lengths in seconds; the longest is measured first.
        start_seconds: audio of the first micro-batch that is tried.

    Raises:
        ValueError: not even one segment of the longest length fits.
    """
    rows: list[tuple[float, int]] = []
    budget = start_seconds
    for seconds in sorted(lengths, reverse=True):
        found = most_rows(lambda n, seconds=seconds: fits(n, seconds), int(budget / seconds))  # type: ignore[misc]
        if not found:
            raise ValueError(f"not even one segment of {seconds:g} s fits in memory; lower data.max_seconds")
        rows.append((seconds, found))
        budget = found * seconds
    return Caps(rows, *_cap_of(rows))


def _cap_of(rows: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Returns cap and q with n * s * (1 + q * s) <= cap at every measured (s, n).

    q comes from the longest and shortest length; cap is the smallest value over all lengths.
    """
    (long, n_long), (short, n_short) = rows[0], rows[-1]
    a, b = n_long * long, n_short * short
    quadratic = max(0.0, (b - a) / (a * long - b * short)) if a * long > b * short else 0.0
    return min(n * s * (1 + quadratic * s) for s, n in rows), quadratic
