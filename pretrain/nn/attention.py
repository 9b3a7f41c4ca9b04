"""Multi-head self-attention and relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.interfaces.streaming import BlockMemory
from pretrain.nn.attention_patterns import AttentionContext, attend, pattern_attention
from pretrain.nn.positions import rotate


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value come from one matrix product.

    Args:
        dim: channels D.
        heads: attention heads.
        head_dim: channels C of each head; heads · C may differ from D.
        dropout: dropout of attention weights.
        gated: scale the relative position bias for each query by a gate computed from its frame (WavLM, §III-A);
            needs heads · C = D.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)
        self.gate = nn.Linear(head_dim, 8) if gated else None
        self.gate_scale = nn.Parameter(torch.ones(1, heads, 1, 1)) if gated else None

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        """Returns the attention output, (B, F, D), for registers and frames `x_BFD`."""
        q, k, v = self.qkv(x_BFD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        p = self.dropout if self.training else 0.0
        gate_BHF1 = None if self.gate is None else self._gate(x_BFD)
        y_BHFC = pattern_attention(q, k, v, context, p=p, gate_BHF1=gate_BHF1)
        if context.gates is not None:
            y_BHFC = y_BHFC * context.gates.heads_H[:, None, None].to(y_BHFC.dtype)
        out: Tensor = self.out(y_BHFC.transpose(1, 2).flatten(2))
        return out

    def step(self, x_BFD: Tensor, memory: BlockMemory, context: AttentionContext) -> tuple[Tensor, BlockMemory]:
        """Returns the attention output of the next chunk of a stream, (B, F, D), and the memory after it."""
        q, k, v = self.qkv(x_BFD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context.rotary is not None:
            q, k = rotate(torch.stack([q, k]), *context.rotary)
        keys, values = torch.cat([memory.keys_BHLC, k], dim=2), torch.cat([memory.values_BHLC, v], dim=2)
        y_BHFC = attend(q, keys, values, None if context.visible_BK is None else context.visible_BK[:, None, None])
        forgotten = 0 if context.left_chunks < 0 else x_BFD.shape[1]
        out: Tensor = self.out(y_BHFC.transpose(1, 2).flatten(2))
        return out, memory._replace(keys_BHLC=keys[:, :, forgotten:], values_BHLC=values[:, :, forgotten:])

    def _gate(self, x_BFD: Tensor) -> Tensor:
        assert self.gate is not None
        assert self.gate_scale is not None
        heads_BHFC = x_BFD.view(*x_BFD.shape[:2], self.heads, -1).transpose(1, 2)
        first, second = self.gate(heads_BHFC).reshape(*heads_BHFC.shape[:-1], 2, 4).sum(-1).sigmoid().chunk(2, dim=-1)
        gate_BHF1: Tensor = first * (second * self.gate_scale - 1.0) + 2.0
        return gate_BHF1


class RelativeBias(nn.Module):
    """Learned bias per head and distance bucket (the buckets of T5, as in WavLM), (heads, F, F)."""

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Embedding(buckets, heads)

    def forward(self, n_frames: int) -> Tensor:
        at = torch.arange(n_frames, device=self.table.weight.device)
        bias: Tensor = self.table(self.bucket(at[None] - at[:, None]))
        return bias.permute(2, 0, 1)

    def bucket(self, distance: Tensor) -> Tensor:
        """Returns the bucket of each distance: half of them per direction, half of those exact, then logarithmic."""
        half = self.buckets // 2
        exact = half // 2
        away = distance.abs()
        ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (distance > 0).long() * half + torch.where(away < exact, away, far)
