"""Counts the floating-point operations of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.models import SpeechModel

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Counter(FlopCounterMode):
    """A context that counts matrix products, convolutions and attention; a multiply-add is two operations.

    torch's counter lacks the fused attention of CPUs, and takes the backward pass of a grouped convolution for that of
    a dense one.
    """

    without_gradient: int
    """Operations that ran with gradients disabled, such as those of a teacher."""

    def __init__(self) -> None:
        ours = {
            CPU_ATTENTION: _attention_flops,
            CPU_ATTENTION_BACKWARD: _attention_backward_flops,
            torch.ops.aten.convolution_backward: _convolution_backward_flops,
        }
        self.without_gradient = 0
        by_shape = {operation: shape_wrapper(count) for operation, count in ours.items()}  # type: ignore[no-untyped-call]
        counts = {operation: self._noted(count) for operation, count in (flop_registry | by_shape).items()}
        super().__init__(display=False, custom_mapping=counts)

    def _noted(self, count: Callable[..., int]) -> Callable[..., int]:
        def noted(*tensors: Any, **named: Any) -> int:
            operations = count(*tensors, **named)
            if not torch.is_grad_enabled():
                self.without_gradient += operations
            return operations

        noted._get_raw = True  # type: ignore[attr-defined]  # torch's mark of a function of tensors, not of shapes
        return noted


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


def _convolution_backward_flops(
    grad_out: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **named: Any,
) -> int:
    """Returns the operations of a convolution's gradients: those of the forward pass for the input, and the weight."""
    places = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * places * math.prod(weight) * (output_mask[0] + output_mask[1])


@torch.no_grad()
def forward_flops(model: SpeechModel, samples: int) -> float:
    """Counts one forward pass of front end and encoder over one segment of `samples` samples.

    A model on the meta device is counted without computing anything.
    """
    device = next(model.parameters()).device
    with Counter() as counted:
        model.eval()(torch.zeros(1, samples, device=device), torch.tensor([samples]))
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
