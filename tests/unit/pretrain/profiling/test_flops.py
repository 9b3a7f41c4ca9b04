"""The counter of floating-point operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.profiling import flops


def test_fused_attention_of_the_cpu_counts_forward_and_backward() -> None:
    B, H, S, D = 2, 3, 8, 16
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    product = 2 * B * H * S * S * D
    with flops.counter() as counted:
        out = F.scaled_dot_product_attention(q, k, v)
    assert counted.get_total_flops() == 2 * product, "scores, and their product with the values"
    with flops.counter() as counted:
        out.sum().backward()
    assert counted.get_total_flops() == 5 * product, "scores again, and the gradients of weights, q, k and v"
