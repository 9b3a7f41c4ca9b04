"""The counter of floating-point operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.profiling import flops


def test_fused_attention_of_the_cpu_counts_forward_and_backward() -> None:
    B, H, S, D = 2, 3, 8, 16
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    product = 2 * B * H * S * S * D
    with flops.Counter() as counted:
        out = F.scaled_dot_product_attention(q, k, v)
    assert counted.get_total_flops() == 2 * product, "scores, and their product with the values"
    with flops.Counter() as counted:
        out.sum().backward()
    assert counted.get_total_flops() == 5 * product, "scores again, and the gradients of weights, q, k and v"


def test_gradients_of_grouped_convolutions_count_as_often_as_the_forward_pass() -> None:
    x = torch.randn(2, 8, 20, requires_grad=True)
    conv, up = torch.nn.Conv1d(8, 16, 5, groups=4), torch.nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2)
    for layer in (conv, up):
        with flops.Counter() as forward:
            out = layer(x)
        with flops.Counter() as backward:
            out.sum().backward()
        assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with flops.Counter() as counted, torch.no_grad():
        conv(x)
    assert counted.without_gradient == counted.get_total_flops() > 0
