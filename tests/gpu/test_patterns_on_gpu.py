"""Compiled FlexAttention on a GPU gives the outputs and gradients of blockwise attention."""

from __future__ import annotations

import pytest
import torch

from pretrain.nn.attention_patterns import AttentionContext, Pattern, flex_mask, pattern_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PATTERNS = {
    "full": (Pattern(), 0),
    "local, registers": (Pattern(reach=32), 8),
    "chunked": (Pattern(chunk=16, left_chunks=8), 0),
}


@pytest.mark.parametrize("documents", [(375, 120, 260), (90, 500, 33)])
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_equals_blockwise_attention(name: str, documents: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pattern, registers = PATTERNS[name]
    context = AttentionContext(None, pattern, n_registers=registers, documents=documents)
    total = context.n_leading + sum(documents)
    q, k, v = (torch.randn(1, 12, total, 64, device="cuda", requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 12, total, 64, device="cuda")
    flex = context._replace(flex=flex_mask(context, 1, total, q.device))
    found, expected = (pattern_attention(q, k, v, chosen) for chosen in (flex, context))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-3, atol=5e-3)
