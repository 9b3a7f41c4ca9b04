"""Counts the floating-point operations of models."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.models import SpeechModel

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def counter() -> FlopCounterMode:
    """Returns a context that counts matrix products, convolutions and attention; a multiply-add is two operations.

    torch's counter lacks the fused attention of CPUs.
    """
    mapping = {CPU_ATTENTION: _attention_flops, CPU_ATTENTION_BACKWARD: _attention_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **named: Any) -> int:
    """Returns the operations of attention between tensors of these shapes."""
    count: int = sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]
    return count


def _attention_backward_flops(
    grad_out: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **named: Any
) -> int:
    """Operations of the backward pass of attention between tensors of these shapes."""
    count: int = sdpa_backward_flop_count(grad_out, q, k, v)  # type: ignore[no-untyped-call]
    return count


@torch.no_grad()
def forward_flops(model: SpeechModel, samples: int) -> float:
    """Counts one forward pass of front end and encoder over one segment of `samples` samples."""
    device = next(model.parameters()).device
    with counter() as counted:
        model.eval()(torch.zeros(1, samples, device=device), torch.tensor([samples], device=device))
    return float(counted.get_total_flops())


def forward_gflop(model: SpeechModel, seconds: float) -> float:
    """Returns operations (10⁹) of a forward pass per second of audio, for segments of `seconds`.

    Counted at one and two seconds: attention grows with the square of the length, all else with the length. Training
    takes about three times as many (forward, and backward for inputs and weights).
    """
    # windows of 400 samples every 160: with 240 samples added to whole seconds, frame counts are exact multiples
    one, two = (forward_flops(model, n * SAMPLE_RATE + 240) for n in (1, 2))
    square = (two - 2 * one) / 2
    return (one - square + square * seconds) / 1e9
