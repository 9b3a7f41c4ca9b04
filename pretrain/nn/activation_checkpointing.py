"""Activation checkpointing of a block: recompute all of it, or only its cheap operations."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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
"""Operations whose results selective checkpointing keeps: most of the compute, but little of the memory."""


def run_checkpointed(mode: Checkpointing, block: Callable[..., Any], *args: Any) -> Any:
    """Returns `block(*args)` with activation checkpointing.

    Args:
        mode: operations that the backward pass recomputes: "none", all ("full"), or all but the matrix products,
            convolutions and attention ("selective").
        block: the function to run.
        args: its arguments.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    if mode == "full":
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_keep_products)


def _keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the results of products during the forward pass, in order.

    torch's own selective checkpointing requires the recomputation to repeat every operation, which the gathering of
    weights under ZeRO-3 breaks; here only the products must match.
    """

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func, args, kwargs or {}):
            self.kept[func].append(_detached(out))
        return out


class _Reuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns the recorded results during the recomputation."""

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func, args, kwargs or {}):
            return self.kept[func].popleft()
        return func(*args, **(kwargs or {}))


def _is_kept(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    if func not in PRODUCTS:
        return False
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | keywords
    # a kernel that draws dropout itself must run again, or all later draws of the recomputation would differ
    return not named.get("dropout_p", 0.0)


def _detached(out: Any) -> Any:
    """Detaches results from the autograd graph, which would keep the activations that are to be freed."""
    if isinstance(out, Tensor):
        return out.detach()
    return tuple(_detached(part) for part in out) if isinstance(out, tuple) else out
