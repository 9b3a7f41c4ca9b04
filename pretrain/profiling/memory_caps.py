"""Runs `auricle data find-caps`: training steps of the real model on the real device, of growing size."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
from pathlib import Path

import psutil
import torch

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import World
from pretrain.interfaces.objectives import StepContext
from pretrain.profiling.plan_caps import Caps, find_caps
from pretrain.train_module import build_model

SHARE_OF_MEMORY = 0.9


def measure_caps(config: Config, world: World, memory_gb: float = 0.0) -> Caps:
    """Caps for `config` on this device, of which 0.9 (or `memory_gb`) may be used.

    One rank holds the whole optimizer state here, so that ZeRO leaves some room to spare.
    """
    alone = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="local", offload="none"))
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
    """Peak bytes of a training step; infinite where memory ran out."""
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
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _reset(device: str) -> None:
    """Forgets the peak of earlier steps."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _memory(world: World) -> float:
    if world.device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return float(psutil.virtual_memory().available)
