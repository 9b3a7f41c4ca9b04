"""Activation checkpointing of a block: recompute all of it, or only what is cheap."""

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
"""Operations whose results selective checkpointing keeps: most of the compute, a minor part of the memory."""


def run_checkpointed(mode: Checkpointing, block: Callable[..., Any], *args: Any) -> Any:
    """`block(*args)`; in the backward pass all of it ("full") or its norms, activations and dropout are run again."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    if mode == "full":
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_keep_products)


def _keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The forward pass: remembers products in order.

    torch's own selective checkpointing wants each operation, cheap ones too, to come again, which the gathering of
    weights under ZeRO-3 breaks; here only products must.
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
    """The recomputation: gives them again."""

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
    # a kernel that draws dropout itself must draw again, or all later draws of the recomputation would be others
    return not named.get("dropout_p", 0.0)


def _detached(out: Any) -> Any:
    """Without the autograd graph, which would keep all that selective checkpointing means to free."""
    if isinstance(out, Tensor):
        return out.detach()
    return tuple(_detached(part) for part in out) if isinstance(out, tuple) else out
