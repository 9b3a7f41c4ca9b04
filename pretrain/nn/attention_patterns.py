"""Attention patterns, computed without an F × F mask where possible.

A pattern is computed block by block (any device, any dropout), with an F × F mask for few frames on a CPU, or on a GPU
with FlexAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pretrain.interfaces.frames import BlockGates
from pretrain.nn.dropout import dropout
from pretrain.nn.packing import TimeGrid

BLOCK = 128
"""Frames per block of queries and of keys in FlexAttention."""
DENSE_FRAMES = 512
"""Most frames of a row whose pattern a CPU computes with an F × F mask, where that is faster (docs/findings.md)."""


class Pattern(NamedTuple):
    """The frames to which a frame attends.

    reach: only frames up to this distance, and the registers (which attend to all frames); None: no limit.
    chunk: only its own chunk of this many frames and `left_chunks` chunks before it (-1: all); 0: no limit.
    """

    reach: int | None = None
    chunk: int = 0
    left_chunks: int = -1


class AttentionContext(NamedTuple):
    """Inputs shared by all blocks. A row begins with registers: those of its utterance, or of all packed utterances."""

    valid_BF: Tensor | None = None
    """False for padding frames; None without any padding, which permits the fastest kernels."""
    pattern: Pattern = Pattern()
    rotary: tuple[Tensor, Tensor] | None = None
    bias_HFF: Tensor | None = None
    n_registers: int = 0
    """Registers per utterance."""
    documents: tuple[int, ...] = ()
    """Frames of each utterance packed into the single row; empty: each row is an utterance."""
    grid: TimeGrid | None = None
    """Positions of packed frames on the time axis of convolutions."""
    flex: BlockMask | None = None
    """The pattern for FlexAttention; None: computed block by block."""
    visible_BK: Tensor | None = None
    """In a stream: which frames of memory and chunk can be attended to; None: all."""
    left_chunks: int = -1
    """In a stream: chunks that the memory keeps; -1: all."""
    residual_KBF1: Tensor | None = None
    """Stochastic depth of this block: factors of its K residual branches; F may be 1."""

    gates: BlockGates | None = None
    """Factors of this block's heads and inner channels; None: all are 1."""

    @property
    def n_leading(self) -> int:
        """Registers before the first frame of a row."""
        return self.n_registers * max(1, len(self.documents))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float = 0.0) -> Tensor:
    """Returns softmax(q·kᵀ/√C)·v with dropout of the attention weights, (B, H, F, C).

    Uses PyTorch's fused kernels, except on a CPU with dropout or in bf16: there plain matrix products take half the
    time (docs/findings.md), as long as the F × F weights are small.

    Args:
        q, k, v: queries (B, H, F, C), keys and values (B, H, K, C).
        mask: bool, True where a query sees a key, or additive, of a shape that broadcasts to (B, H, F, K); None: all
            are seen.
        p: probability of dropping an attention weight.
    """
    plain = q.device.type == "cpu" and (p > 0 or q.dtype == torch.bfloat16) and k.shape[-2] <= 2048
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return dropout(scores.softmax(-1), p) @ v


def pattern_attention(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, p: float = 0.0, gate_BHF1: Tensor | None = None
) -> Tensor:
    """Returns the attention output, (B, H, F, C), with the context's pattern.

    Packed utterances attend within themselves only.

    Args:
        q, k, v: (B, H, R + F, C) queries, keys and values of R registers and F frames.
        context: pattern, padding, packing and relative position bias.
        p: dropout of the attention weights.
        gate_BHF1: scales the relative position bias (see SelfAttention); None: 1.
    """
    if context.flex is not None and p == 0 and gate_BHF1 is None:
        found: Tensor = _flex(q.device.type)(q, k, v, block_mask=context.flex)
        return found
    if not context.documents:
        return _utterances(q, k, v, context, p=p, gate_BHF1=gate_BHF1)
    R, sizes = context.n_registers, list(context.documents)
    alone = context._replace(documents=())
    queries, keys, values = (_documents(x, R, sizes) for x in (q, k, v))
    gates = [None] * len(sizes) if gate_BHF1 is None else _documents(gate_BHF1, R, sizes)
    each = zip(queries, keys, values, gates, strict=True)
    y_BHFC = [_utterances(query, key, value, alone, p=p, gate_BHF1=gate) for query, key, value, gate in each]
    return torch.cat([y[:, :, :R] for y in y_BHFC] + [y[:, :, R:] for y in y_BHFC] if R else y_BHFC, dim=2)


def _documents(x_1HNC: Tensor, registers: int, sizes: list[int]) -> list[Tensor]:
    """Splits a packed row into the registers and frames of each utterance."""
    frames = torch.split(x_1HNC[:, :, registers * len(sizes) :], sizes, dim=2)
    if not registers:
        return list(frames)
    first = torch.split(x_1HNC[:, :, : registers * len(sizes)], registers, dim=2)
    return [torch.cat(part, dim=2) for part in zip(first, frames, strict=True)]


def _utterances(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, p: float, gate_BHF1: Tensor | None
) -> Tensor:
    pattern, n_frames = context.pattern, q.shape[2]
    if gate_BHF1 is not None:  # a gated bias differs for each pair of frames and needs an F × F tensor
        assert context.bias_HFF is not None
        bias = gate_BHF1 * context.bias_HFF[:, :n_frames, :n_frames]
        if pattern != Pattern():
            bias = bias.masked_fill(~dense_mask(context, len(q), n_frames, q.device)[:, None], float("-inf"))
        elif context.valid_BF is not None:
            bias = bias.masked_fill(~context.valid_BF[:, None, None], float("-inf"))
        return attend(q, k, v, bias.to(q.dtype), p)
    chunked = 0 < pattern.chunk < n_frames - context.n_registers
    if pattern.reach is None and not chunked:
        return attend(q, k, v, None if context.valid_BF is None else context.valid_BF[:, None, None], p)
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if q.device.type == "cpu" and not exported and _dense_is_faster(pattern, n_frames):
        rows = 1 if context.valid_BF is None else len(q)
        return attend(q, k, v, dense_mask(context, rows, n_frames, q.device)[:, None], p)
    return chunked_attention(q, k, v, context, p) if chunked else local_attention(q, k, v, context, p)


def _dense_is_faster(pattern: Pattern, n_frames: int) -> bool:
    """Returns whether a CPU masks all pairs faster than it computes block by block, forward and backward."""
    if n_frames > DENSE_FRAMES:
        return False
    if pattern.reach is not None:
        return n_frames <= max(128, 4 * pattern.reach)
    return n_frames <= 256 or pattern.left_chunks < 0


def local_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, p: float = 0.0) -> Tensor:
    """Returns local attention of (B, H, R + F, C): frames attend up to distance `reach` and to the R registers.

    Registers attend to all frames. Frames are cut into blocks of `reach`; each block attends to itself and its two
    neighbours, so that time and memory are linear in F.

    Args:
        q, k, v: queries, keys and values, (B, H, R + F, C).
        context: pattern, registers, packed utterances and valid frames.
        p: probability of dropping an attention weight.
    """
    reach, R, valid_BF = context.pattern.reach, context.n_registers, context.valid_BF
    assert reach is not None
    B, H, total, C = q.shape
    n_blocks, exporting = -(-(total - R) // reach), torch.compiler.is_exporting()
    if exporting:  # a graph cannot branch on sizes: always spare frames, always two blocks or more
        n_blocks = (total - R) // reach + 2
    spare = n_blocks * reach - (total - R)
    queries = F.pad(q[:, :, R:], (0, 0, 0, spare)).view(B, H, n_blocks, reach, C)
    keys, values = (
        F.pad(x[:, :, R:], (0, 0, reach, reach + spare)).unfold(2, 3 * reach, reach).transpose(3, 4) for x in (k, v)
    )
    frames_BF = torch.ones(1, total - R, dtype=torch.bool, device=q.device) if valid_BF is None else valid_BF[:, R:]
    valid = F.pad(frames_BF, (reach, reach + spare)).unfold(1, 3 * reach, reach)[:, None, :, None]
    at = torch.arange(3 * reach, device=q.device)
    distance = (at[None] - reach - at[:reach, None]).abs()
    # each frame attends to itself, so that padding has a finite softmax
    mask = ((distance <= reach) & valid) | (distance == 0)
    if R:
        keys = torch.cat([k[:, :, None, :R].expand(B, H, n_blocks, R, C), keys], dim=3)
        values = torch.cat([v[:, :, None, :R].expand(B, H, n_blocks, R, C), values], dim=3)
        mask = F.pad(mask, (R, 0), value=True)
    if exporting:  # ONNX's attention has four axes: blocks count as heads
        mask = mask.expand(-1, H, -1, -1, -1)
        queries, keys, values, mask = (x.flatten(1, 2) for x in (queries, keys, values, mask))
        y = attend(queries, keys, values, mask, p).view(B, H, n_blocks, reach, C)
    else:
        y = attend(queries, keys, values, mask, p)
    y_BHFC = y.flatten(2, 3)[:, :, : total - R]
    if not R:
        return y_BHFC
    registers = attend(q[:, :, :R], k, v, None if valid_BF is None else valid_BF[:, None, None], p)
    return torch.cat([registers, y_BHFC], dim=2)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, p: float = 0.0) -> Tensor:
    """Returns attention of (B, H, R + F, C) to a frame's own chunk, those before it and R registers, chunk by chunk.

    Registers attend to all frames.

    Args:
        q, k, v: queries, keys and values, (B, H, R + F, C).
        context: pattern, registers, packed utterances and valid frames.
        p: probability of dropping an attention weight.
    """
    (_, chunk, left), R, valid_BF = context.pattern, context.n_registers, context.valid_BF
    n_frames, parts = q.shape[2], []
    if R:
        parts.append(attend(q[:, :, :R], k, v, None if valid_BF is None else valid_BF[:, None, None], p))
    for start in range(R, n_frames, chunk):
        first, end = max(R, start - left * chunk) if left >= 0 else R, min(start + chunk, n_frames)
        mask = None
        if valid_BF is not None:  # padding attends to itself, so that its softmax is finite
            own = torch.ones(end - start, end - first, dtype=torch.bool, device=q.device)
            own = own.triu(start - first).tril(start - first)
            mask = F.pad(valid_BF[:, None, None, first:end] | own, (R, 0), value=True)
        keys, values = (
            torch.cat([x[:, :, :R], x[:, :, first:end]], dim=2) if R else x[:, :, first:end] for x in (k, v)
        )
        parts.append(attend(q[:, :, start:end], keys, values, mask, p))
    return torch.cat(parts, dim=2)


class _Visible(NamedTuple):
    """The keys that each query attends to: the registers and one interval of frames of its own utterance.

    places: position of each frame in its utterance, −1 for registers.  first, last: the interval.  register: whether
    the position is a register.  owner: index of the utterance, unique for each padding frame.
    All fields are tensors, since a compiled kernel would be recompiled for every new number.
    """

    places_F: Tensor
    first_F: Tensor
    last_F: Tensor
    register_F: Tensor
    owner_BF: Tensor

    @classmethod
    def of(cls, context: AttentionContext, rows: int, n_frames: int, device: torch.device) -> _Visible:
        (reach, chunk, left), R, leading = context.pattern, context.n_registers, context.n_leading
        sizes = context.documents or (n_frames - leading,)
        places_F = torch.cat([torch.full((leading,), -1), *map(torch.arange, sizes)])
        utterances_F = torch.cat([torch.arange(len(sizes)).repeat_interleave(torch.tensor(n)) for n in (R, sizes)])
        first_F, last_F = torch.zeros_like(places_F), torch.full_like(places_F, max(sizes))
        if reach is not None:
            first_F, last_F = places_F - reach, places_F + reach
        elif chunk:
            first_F = (places_F // chunk - left) * chunk if left >= 0 else first_F
            last_F = (places_F // chunk + 1) * chunk - 1
        register_F = places_F < 0
        first_F, last_F = first_F.masked_fill(register_F, 0), last_F.masked_fill(register_F, max(sizes))
        owner_BF = utterances_F.to(device).expand(rows, n_frames)
        if context.valid_BF is not None:
            owner_BF = torch.where(context.valid_BF, owner_BF, 1 + len(sizes) + torch.arange(n_frames, device=device))
        places, first, last, register = (x.to(device) for x in (places_F, first_F, last_F, register_F))
        return cls(places, first, last, register, owner_BF)

    def function(self) -> Callable[..., Tensor]:
        """Returns the mask function (row, head, query, key) -> bool for FlexAttention and `dense_mask`."""
        places, first, last, register, owner_BF = self

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (first[query] <= places[key]) & (places[key] <= last[query])
            return (owner_BF[row, query] == owner_BF[row, key]) & (near | register[key])

        return allowed

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Returns which key blocks a query block attends to partially, and which entirely, two (B, Q, K) bool tensors.

        Computed from the minimum and maximum of each block, without an F × F tensor.
        """
        (first, first_max), (last_min, last) = _range(self.first_F), _range(self.last_F)
        (place, place_max), (owner, owner_max) = _range(self.places_F), _range(self.owner_BF)
        register = _range(self.register_F.long())[1] > 0
        near = (first[:, None] <= place_max) & (place <= last[:, None])
        related = (owner[:, :, None] <= owner_max[:, None]) & (owner[:, None] <= owner_max[:, :, None])
        seen = related & (near | register)
        alone = owner == owner_max
        whole = (first_max[:, None] <= place) & (place_max <= last_min[:, None]) & ~register
        whole = whole & related & alone[:, :, None] & alone[:, None]
        if self.places_F.shape[0] % BLOCK:  # blocks beyond the last frame are never entire
            whole[:, -1], whole[:, :, -1] = False, False
        return seen & ~whole, whole


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns minimum and maximum of each block of (…, F)."""
    spare = -x.shape[-1] % BLOCK
    blocks = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], spare)], dim=-1).view(*x.shape[:-1], -1, BLOCK)
    return blocks.amin(-1), blocks.amax(-1)


def dense_mask(context: AttentionContext, rows: int, n_frames: int, device: torch.device) -> Tensor:
    """Returns the pattern as a (B, F, F) bool tensor; True attends.

    Args:
        context: pattern, packed utterances and valid frames.
        rows: B.
        n_frames: F, leading frames included.
        device: of the result.
    """
    at = torch.arange(n_frames, device=device)
    row = torch.arange(rows, device=device)
    allowed = _Visible.of(context, rows, n_frames, device).function()
    return allowed(row[:, None, None], torch.zeros_like(row), at[None, :, None], at[None, None])


def flex_mask(context: AttentionContext, rows: int, n_frames: int, device: torch.device) -> BlockMask | None:
    """Returns the pattern for FlexAttention; None if frames attend to their whole row, which has faster kernels.

    PyTorch's `create_block_mask` would build a dense mask first.

    Args:
        context: pattern, packed utterances and valid frames.
        rows: B.
        n_frames: F, leading frames included.
        device: of the result.
    """
    if context.pattern == Pattern() and len(context.documents) < 2:
        return None
    visible = _Visible.of(context, rows, n_frames, device)
    partial, whole = (_listed(some_BQK) for some_BQK in visible.blocks())
    sizes = (n_frames, n_frames)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=visible.function(), seq_lengths=sizes)


def _listed(some_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of key blocks per query block, and an order of the key blocks that begins with them."""
    order_BQK = some_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return some_BQK.sum(-1, dtype=torch.int32)[:, None], order_BQK.int()[:, None]


@functools.cache
def _flex(device: str) -> Any:
    """Returns FlexAttention, compiled on a GPU; PyTorch's uncompiled reference on a CPU."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
