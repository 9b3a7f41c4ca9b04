"""Attention patterns, padded and packed, blockwise and by FlexAttention, against dense masks built pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.nn import attention_patterns
from pretrain.nn.attention_patterns import BLOCK, AttentionContext, Pattern, dense_mask, flex_mask, pattern_attention
from tests.support.parity_table import Parity

PATTERNS = {
    "full": (Pattern(), 0),
    "local": (Pattern(reach=4), 0),
    "local, registers": (Pattern(reach=7), 3),
    "full, registers": (Pattern(), 3),
    "chunked, all before": (Pattern(chunk=8), 0),
    "chunked, one before": (Pattern(chunk=8, left_chunks=1), 0),
    "chunked, none before": (Pattern(chunk=5, left_chunks=0), 0),
    "one chunk is longer": (Pattern(chunk=64, left_chunks=2), 0),
}
LENGTHS = (29, 8, 1, 17)


def allowed(pattern: Pattern, registers: int, length: int) -> Tensor:
    """Returns the (R + length, R + length) bool mask of one utterance, computed pair by pair."""
    total = registers + length
    mask = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            at, other = query - registers, key - registers
            if at < 0 or other < 0:
                mask[query, key] = True
            elif pattern.reach is not None:
                mask[query, key] = abs(at - other) <= pattern.reach
            elif pattern.chunk:
                behind = at // pattern.chunk - other // pattern.chunk
                mask[query, key] = behind >= 0 and (pattern.left_chunks < 0 or behind <= pattern.left_chunks)
            else:
                mask[query, key] = True
    return mask


def padded(pattern: Pattern, registers: int) -> tuple[AttentionContext, Tensor, Tensor]:
    """Returns the context, the dense mask (B, F, F) and the valid frames."""
    total = registers + max(LENGTHS)
    valid_BF = torch.arange(total) < registers + torch.tensor(LENGTHS)[:, None]
    mask = torch.eye(total, dtype=torch.bool).repeat(len(LENGTHS), 1, 1)
    for row, length in enumerate(LENGTHS):
        mask[row, : registers + length, : registers + length] = allowed(pattern, registers, length)
    return AttentionContext(valid_BF, pattern, n_registers=registers), mask, valid_BF


def packed(pattern: Pattern, registers: int) -> tuple[AttentionContext, Tensor, Tensor]:
    n, leading = len(LENGTHS), registers * len(LENGTHS)
    total = leading + sum(LENGTHS)
    mask = torch.zeros(1, total, total, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        start = leading + sum(LENGTHS[:row])
        own = [*range(row * registers, (row + 1) * registers), *range(start, start + length)]
        mask[0, torch.tensor(own)[:, None], torch.tensor(own)] = allowed(pattern, registers, length)
    assert n == 4
    return AttentionContext(None, pattern, n_registers=registers, documents=LENGTHS), mask, torch.ones(1, total) > 0


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dense_frames", [0, 512])
def test_blockwise_and_flex_attention_equal_the_dense_mask(
    name: str, layout: object, dense_frames: int, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dense_frames: 0 computes block by block, 512 masks all pairs where the pattern is not full attention."""
    monkeypatch.setattr(attention_patterns, "DENSE_FRAMES", dense_frames)
    torch.manual_seed(0)
    context, mask, counts_BF = layout(*PATTERNS[name])  # type: ignore[operator]
    rows, total = counts_BF.shape
    assert torch.equal(
        dense_mask(context, rows, total, mask.device) & counts_BF[:, :, None], mask & counts_BF[:, :, None]
    )
    q, k, v = (torch.randn(rows, 2, total, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(rows, 2, total, 8) * counts_BF[:, None, :, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]) * counts_BF[:, None, :, None]
    found = pattern_attention(q, k, v, context) * counts_BF[:, None, :, None]
    parity("attention patterns by blocks = dense mask", 1e-5, float((found - expected).abs().max()))
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    for mine, other in zip(ours, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        parity("attention patterns by blocks = dense mask: gradients", 1e-5, float((mine - other).abs().max()))
    flex = context._replace(flex=flex_mask(context, rows, total, mask.device))
    by_flex = pattern_attention(q.detach(), k.detach(), v.detach(), flex) * counts_BF[:, None, :, None]
    parity("attention patterns by FlexAttention = dense mask", 1e-5, float((by_flex - expected).abs().max()))


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in (out,) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("pattern", [Pattern(reach=32), Pattern(chunk=32, left_chunks=1), Pattern(chunk=32)])
@pytest.mark.parametrize(("documents", "padding"), [((), 0), ((), 40), ((700, 340), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mask_over_all_pairs_is_materialised(
    pattern: Pattern, documents: tuple[int, ...], padding: int, dtype: torch.dtype
) -> None:
    """The largest tensor is much smaller than F × F, also with attention to all previous chunks."""
    q, k, v = (torch.randn(1, 1, 1040, 4, dtype=dtype) for _ in range(3))
    valid_BF = torch.arange(1040)[None] < 1040 - padding if padding else None
    with Largest() as largest:
        pattern_attention(q, k, v, AttentionContext(valid_BF, pattern, documents=documents))
    assert largest.numbers < 0.15 * 1040 * 1040


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("documents", [(), (700, 40, 300)])
def test_flex_block_lists_are_complete_and_built_without_all_pairs(name: str, documents: tuple[int, ...]) -> None:
    """No needed block is missing, full blocks are full, and no tensor over all pairs is made."""
    pattern, registers = PATTERNS[name]
    total = registers * max(1, len(documents)) + 1040
    valid_BF = None if documents else torch.arange(total)[None] < torch.tensor([[total], [700]])
    context = AttentionContext(valid_BF, pattern, n_registers=registers, documents=documents)
    rows = 1 if documents else 2
    with Largest() as largest:
        found = flex_mask(context, rows, total, torch.device("cpu"))
    if found is None:
        assert pattern == Pattern()
        return
    assert largest.numbers < 0.05 * total * total
    spare = -total % BLOCK
    dense = F.pad(dense_mask(context, rows, total, torch.device("cpu")), (0, spare, 0, spare))
    tiles = dense.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(3)
    partial, whole = listed(found.kv_num_blocks, found.kv_indices), listed(*full_lists(found))
    assert not (partial & whole).any()
    assert not (tiles.any(3) & ~partial & ~whole).any(), "a needed block is missing"
    assert (tiles.all(3) | ~whole).all(), "a partial block is listed as full"
    if "none before" in name or "one before" in name or name == "local":
        assert (partial | whole).float().mean() < 0.5


def full_lists(mask: BlockMask) -> tuple[Tensor, Tensor]:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return mask.full_kv_num_blocks, mask.full_kv_indices


def listed(counts_B1Q: Tensor, order_B1QK: Tensor) -> Tensor:
    """Converts lists of blocks to a (B, Q, K) bool tensor."""
    first = torch.arange(order_B1QK.shape[-1]) < counts_B1Q[..., None]
    return torch.zeros_like(first).scatter(-1, order_B1QK.long(), first)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_the_compiled_flex_kernel_equals_blockwise_attention(name: str) -> None:
    """Eager FlexAttention computes all pairs; only the compiled kernel skips unlisted blocks."""
    pattern, registers = PATTERNS[name]
    documents = (300, 40, 130)
    total = registers * 3 + sum(documents)
    context = AttentionContext(None, pattern, n_registers=registers, documents=documents)
    q, k, v = (torch.randn(1, 2, total, 16) for _ in range(3))
    mask = flex_mask(context, 1, total, q.device)
    with torch.no_grad():
        found = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask)
        torch.testing.assert_close(found, pattern_attention(q, k, v, context), rtol=0, atol=1e-5)
