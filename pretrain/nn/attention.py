"""Multi-head self-attention and its patterns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.dropout import dropout
from pretrain.nn.positions import rotate


class AttentionContext(NamedTuple):
    """What all blocks share. mask: bool, broadcasts to (B, heads, F, F), True attends; None lets a fast kernel run.

    reach: attend only to frames so near, and to the first `n_registers` ones, which attend to all; None: no limit.
    """

    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None = None
    bias_HFF: Tensor | None = None
    valid_BF: Tensor | None = None
    reach: int | None = None
    n_registers: int = 0


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
        p = self.dropout if self.training else 0.0
        if context.reach is not None:
            y_BHFC = local_attention(q, k, v, context, p)
        else:
            mask = context.mask if self.gate is None else self._gated_bias(x_BFD, context).to(q.dtype)
            y_BHFC = attend(q, k, v, mask, p)
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float = 0.0) -> Tensor:
    """softmax(q·kᵀ/√C)·v with dropout of the weights, (B, H, F, C).

    PyTorch's fused kernels, except where they are slow: on a CPU with dropout or in bf16, plain products take half
    the time (LOG.md), as long as the F × F weights are small.
    """
    plain = q.device.type == "cpu" and (p > 0 or q.dtype == torch.bfloat16) and k.shape[-2] <= 2048
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return dropout(scores.softmax(-1), p) @ v


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


def local_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, p: float = 0.0) -> Tensor:
    """Attention of (B, H, R + F, C) to frames at distance ≤ reach and to the R registers; registers attend to all.

    Frames are cut into blocks of `reach`; each block attends to itself and its two neighbours, so that time and memory
    grow with F and no F × F mask exists.
    """
    reach, R, valid_BF = context.reach, context.n_registers, context.valid_BF
    assert reach is not None
    assert valid_BF is not None
    B, H, total, C = q.shape
    n_blocks = -(-(total - R) // reach)
    spare = n_blocks * reach - (total - R)
    queries = F.pad(q[:, :, R:], (0, 0, 0, spare)).view(B, H, n_blocks, reach, C)
    keys, values = (
        F.pad(x[:, :, R:], (0, 0, reach, reach + spare)).unfold(2, 3 * reach, reach).transpose(3, 4) for x in (k, v)
    )
    valid = F.pad(valid_BF[:, R:], (reach, reach + spare)).unfold(1, 3 * reach, reach)[:, None, :, None]
    at = torch.arange(3 * reach, device=q.device)
    distance = (at[None] - reach - at[:reach, None]).abs()
    # each frame attends to itself, so that padding, which attends to nothing else, stays finite
    mask = ((distance <= reach) & valid) | (distance == 0)
    if R:
        keys = torch.cat([k[:, :, None, :R].expand(B, H, n_blocks, R, C), keys], dim=3)
        values = torch.cat([v[:, :, None, :R].expand(B, H, n_blocks, R, C), values], dim=3)
        mask = F.pad(mask, (R, 0), value=True)
    y = attend(queries, keys, values, mask, p)
    y_BHFC = y.flatten(2, 3)[:, :, : total - R]
    if not R:
        return y_BHFC
    registers = attend(q[:, :, :R], k, v, context.mask, p)
    return torch.cat([registers, y_BHFC], dim=2)


def chunk_mask(
    n_frames: int, chunk: int, left_chunks: int, padding: Tensor | None, device: torch.device
) -> Tensor | None:
    """(1 or B, 1, F, F) bool: each frame sees its own chunk and `left_chunks` before it (all, if negative).

    chunk 0 sees everything. Each frame sees itself, so that padding stays finite.
    """
    if chunk == 0:
        return padding
    number = torch.arange(n_frames, device=device) // chunk
    behind = number[:, None] - number[None]
    mask = (behind >= 0) & ((behind <= left_chunks) if left_chunks >= 0 else True)
    if padding is None:
        return mask[None, None]
    return (mask & padding) | torch.eye(n_frames, dtype=torch.bool, device=device)


def padding_mask(valid_BF: Tensor) -> Tensor | None:
    """What keeps attention off padding, (B, 1, 1, F) bool; None where nothing is padded."""
    return None if bool(torch.all(valid_BF)) else valid_BF[:, None, None, :]
