"""Counts floating-point operations of a model."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.models import SpeechModel


def forward_gflop(model: SpeechModel, seconds: float) -> float:
    """Operations (10⁹) of one forward pass per second of audio, for crops of `seconds`; training takes about thrice.

    Counted at one and two seconds: attention grows with the square of the length, all else with the length.
    """
    one, two = _flops(model.eval(), 1.0), _flops(model, 2.0)
    square = (two - 2 * one) / 2
    return (one - square + square * seconds) / 1e9


@torch.no_grad()
def _flops(model: SpeechModel, seconds: float) -> float:
    # a window is 400 samples and a hop 160: with 240 more than whole seconds, frames are whole multiples, too
    samples = int(seconds * SAMPLE_RATE) + 240
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, samples), torch.tensor([samples]))
    return float(counter.get_total_flops())
