"""Model FLOP utilisation: FLOP/s that the model needs over what the devices could do (PaLM, arXiv 2204.02311, app. B).

Counted is the forward pass of front end and encoder, three times for forward and backward. What is recomputed, teachers
and heads do not count, so that no waste looks like use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config, EngineConfig
from pretrain.train_module import build_speech_model

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "A30": (165, 82),
    "A40": (149.7, 74.8),
    "A100": (312, 156),
    "RTX A6000": (154.8, 77.4),
    "RTX 3090": (71, 35.6),
    "RTX 4090": (165.2, 82.6),
    "L4": (121, 60),
    "L40": (181, 90.5),
    "L40S": (362, 183),
    "GH200": (989, 494.7),
    "H100": (989, 494.7),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417.5),
    "H200": (989, 494.7),
    "B200": (2250, 1100),
    "MI300X": (1307, 653.7),
}
"""Part of a device's name in torch -> its dense TFLOP/s in 16 bits, and in fp32 with TF32 (makers' data sheets)."""


@dataclass(frozen=True)
class Utilisation:
    """What one second of audio costs in training, and what all devices could do in a second."""

    flop_per_audio_second: float
    peak_flops: float

    def share(self, audio_seconds_per_second: float) -> float:
        """MFU, 0 to 1."""
        return self.flop_per_audio_second * audio_seconds_per_second / self.peak_flops


def measure(config: Config, device: str, devices: int) -> Utilisation | None:
    """None where the peak of `device` is unknown: `engine.peak_tflops` gives it for a CPU, say."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    peak = peak_tflops(config.engine, name) * 1e12 * devices
    return Utilisation(3 * forward_flop(config), peak) if peak else None


def peak_tflops(engine: EngineConfig, device_name: str) -> float:
    """What one device could do at best in this precision; 0 where nobody said."""
    if engine.peak_tflops:
        return engine.peak_tflops
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= set(device_name.replace("-", " ").split())]
    if not known or (engine.precision == "fp32" and not engine.tf32):
        return 0.0
    half, tf32 = PEAK_TFLOPS[max(known, key=len)]
    return tf32 if engine.precision == "fp32" else half


@torch.no_grad()
def forward_flop(config: Config) -> float:
    """FLOP of one forward pass per second of audio, counted on a copy of the model and noise of usual length."""
    seconds = min((config.data.min_seconds + config.data.max_seconds) / 2, 10.0)
    model = build_speech_model(config).eval()
    samples = round(seconds * SAMPLE_RATE)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, samples, generator=torch.Generator().manual_seed(0)), torch.tensor([samples]))
    return float(counter.get_total_flops()) * SAMPLE_RATE / samples
