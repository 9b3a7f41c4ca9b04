"""Activation checkpointing of a block: recompute all of it, or only what is cheap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""What selective checkpointing keeps: nearly all of the compute, and a minor part of the memory."""


def run_checkpointed(mode: Checkpointing, block: Callable[..., Any], *args: Any) -> Any:
    """`block(*args)`; in the backward pass all of it ("full") or its norms, activations and dropout are run again."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    if mode == "full":
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_selective)


_selective = functools.partial(create_selective_checkpoint_contexts, lambda ctx, op, *args, **kw: _policy(op, args, kw))


def _policy(op: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> CheckpointPolicy:
    if op not in PRODUCTS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | keywords
    # a kernel that draws dropout itself must draw again, or all later draws of the recomputation would be others
    return CheckpointPolicy.PREFER_RECOMPUTE if named.get("dropout_p", 0.0) else CheckpointPolicy.MUST_SAVE
