"""Importance of heads and inner channels by the size of their weights."""

from __future__ import annotations

import torch

from pretrain.interfaces.frames import BlockGates
from pretrain.nn.block_stack import BlockStack


@torch.no_grad()
def importance(encoder: BlockStack) -> tuple[BlockGates, ...]:
    """Returns a score of each head and inner channel: norm of the weights into it times norm of those out of it.

    For a head, summed over its channels, with the values' weights; the magnitude criterion of structured pruning.
    """
    state, found = encoder.state_dict(), []
    for number, width in enumerate(encoder.stack_config.block_widths):
        prefix = f"blocks.{number}."
        values_HC = state[f"{prefix}attention.qkv.weight"].chunk(3)[2].norm(dim=1).view(width.heads, -1)
        out_HC = state[f"{prefix}attention.out.weight"].norm(dim=0).view(width.heads, -1)
        channels = tuple(
            state[f"{prefix}{inner}.weight"].norm(dim=1) * state[f"{prefix}{outer}.weight"].norm(dim=0)
            for inner, outer in encoder.feed_forwards
        )
        found.append(BlockGates((values_HC * out_HC).sum(1), channels))
    return tuple(found)


@torch.no_grad()
def sort_by_importance(encoder: BlockStack) -> None:
    """Sorts heads and inner channels of each block in place, the most important first; the outputs stay the same.

    Heads that share a relative position bias keep their order.
    """
    state = encoder.state_dict()  # shares memory with the weights
    for number, (score, width) in enumerate(zip(importance(encoder), encoder.stack_config.block_widths, strict=True)):
        prefix = f"blocks.{number}."
        if encoder.stack_config.heads_may_differ:
            heads_H = score.heads_H.argsort(descending=True, stable=True)
            for name in ("qkv.weight", "qkv.bias"):
                into = state[f"{prefix}attention.{name}"].unflatten(0, (3, width.heads, -1))
                into.copy_(into[:, heads_H].clone())
            out_DHC = state[f"{prefix}attention.out.weight"].unflatten(1, (width.heads, -1))
            out_DHC.copy_(out_DHC[:, heads_H].clone())
        for (inner, outer), score_C in zip(encoder.feed_forwards, score.channels, strict=True):
            channels_C = score_C.argsort(descending=True, stable=True)
            for name in (f"{inner}.weight", f"{inner}.bias"):
                state[prefix + name].copy_(state[prefix + name][channels_C].clone())
            out_DC = state[f"{prefix}{outer}.weight"]
            out_DC.copy_(out_DC[:, channels_C].clone())
