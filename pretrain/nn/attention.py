"""Multi-head self-attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.positions import rotate


class AttentionContext(NamedTuple):
    """What all blocks share. mask: bool, broadcasts to (B, heads, F, F), True attends; None lets a fast kernel run."""

    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None = None
    bias_HFF: Tensor | None = None


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value come from one matrix product.

    gated: a relative position bias is scaled for each query by a gate computed from its frame (WavLM, §III-A).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention: {dim} channels do not divide into {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim // heads, 8) if gated else None
        self.gate_scale = nn.Parameter(torch.ones(1, heads, 1, 1)) if gated else None

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        q, k, v = self.qkv(x_BFD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        mask = context.mask if self.gate is None else self._gated_bias(x_BFD, context).to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        y_BHFC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out(y_BHFC.transpose(1, 2).flatten(2))
        return out

    def _gated_bias(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        assert self.gate is not None
        assert self.gate_scale is not None
        assert context.bias_HFF is not None
        heads_BHFC = x_BFD.view(*x_BFD.shape[:2], self.heads, -1).transpose(1, 2)
        first, second = self.gate(heads_BHFC).reshape(*heads_BHFC.shape[:-1], 2, 4).sum(-1).sigmoid().chunk(2, dim=-1)
        gate_BHF1 = first * (second * self.gate_scale - 1.0) + 2.0
        bias: Tensor = gate_BHF1 * context.bias_HFF
        if context.mask is not None:
            bias = bias.masked_fill(~context.mask, float("-inf"))
        return bias


class RelativeBias(nn.Module):
    """A learned bias for each head and bucket of distance (T5's buckets, as in WavLM), (heads, F, F)."""

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Embedding(buckets, heads)

    def forward(self, n_frames: int) -> Tensor:
        at = torch.arange(n_frames, device=self.table.weight.device)
        bias: Tensor = self.table(self.bucket(at[None] - at[:, None]))
        return bias.permute(2, 0, 1)

    def bucket(self, distance: Tensor) -> Tensor:
        """Half of the buckets for each direction; exact up to a quarter of them, then logarithmic."""
        half = self.buckets // 2
        exact = half // 2
        away = distance.abs()
        ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (distance > 0).long() * half + torch.where(away < exact, away, far)


def padding_mask(valid_BF: Tensor) -> Tensor | None:
    """What keeps attention off padding, (B, 1, 1, F) bool; None where nothing is padded."""
    return None if bool(torch.all(valid_BF)) else valid_BF[:, None, None, :]
