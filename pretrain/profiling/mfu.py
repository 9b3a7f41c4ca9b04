"""Model FLOP utilisation (MFU): the model's FLOP/s relative to the peak (PaLM, arXiv 2204.02311, appendix B).

The forward pass of front end and encoder is counted three times, for forward and backward. Recomputation, teachers and
heads are not counted, so that overhead never appears as utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config, EngineConfig
from pretrain.profiling import hardware
from pretrain.profiling.flops import forward_flops
from pretrain.train_module import build_speech_model

LONGEST_SECONDS = 10.0
"""Longest segment that is counted; beyond it the cost per second hardly grows."""


@dataclass(frozen=True)
class Utilisation:
    """flop_per_audio_second: operations of training.  peak_flops: peak FLOP/s of all devices together."""

    flop_per_audio_second: float
    peak_flops: float

    def share(self, audio_seconds_per_second: float) -> float:
        """Returns the MFU, 0 to 1, at a throughput in seconds of audio per second."""
        return self.flop_per_audio_second * audio_seconds_per_second / self.peak_flops


def measure(config: Config, device: str, devices: int) -> Utilisation | None:
    """Returns cost and peak of a run on `devices` devices of the type of `device`.

    None if the peak is unknown: `engine.peak_tflops` sets that of a CPU or of a GPU that hardware.GPUS lacks.
    """
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    peak = device_peak_tflops(config.engine, name) * 1e12 * devices
    return Utilisation(3 * forward_flop(config), peak) if peak else None


def device_peak_tflops(engine: EngineConfig, device_name: str) -> float:
    """Returns the peak of one device in the engine's precision, in TFLOP/s; 0 if it is unknown."""
    if engine.peak_tflops:
        return engine.peak_tflops
    gpu = hardware.find_gpu(device_name)
    return hardware.peak_tflops(gpu, engine.precision, engine.tf32) if gpu else 0.0


def forward_flop(config: Config) -> float:
    """Returns the operations of a forward pass per second of audio, for the config's model and mean segment length."""
    seconds = min((config.data.min_seconds + config.data.max_seconds) / 2, LONGEST_SECONDS)
    samples = round(seconds * SAMPLE_RATE)
    return forward_flops(build_speech_model(config), samples) * SAMPLE_RATE / samples
