"""Transformer encoder: post-norm (BASE), pre-norm (LARGE); positions by convolution or rotation."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.schema import about, config
from pretrain.nn.attention import AttentionContext, RelativeBias, SelfAttention
from pretrain.nn.dropout import Dropout
from pretrain.nn.positions import ConvPositions, ConvPositionsStack
from pretrain.nn.stack import BlockStack, StackConfig
from pretrain.types import EncoderOutput, Frames, StepContext


@config
class Config(StackConfig):
    name: Literal["transformer"] = "transformer"
    norm: Annotated[Literal["post", "pre"], about("layer norm after each residual sum (BASE) or before (LARGE)")] = (
        "post"
    )
    positions: Annotated[
        Literal["conv", "conv_stack", "rope", "none"],
        about("one wide convolution (wav2vec 2.0), several narrow ones (data2vec), or rotary angles, which can stream"),
    ] = "conv"
    conv_positions_kernel: Annotated[int, about("taps of each positional convolution", ge=1)] = 128
    conv_positions_groups: Annotated[int, about("its groups; must divide dim", ge=1)] = 16
    conv_positions_depth: Annotated[int, about("convolutions in a conv_stack", ge=1)] = 5
    relative_bias: Annotated[bool, about("gated relative position bias in each attention, too (WavLM)")] = False
    relative_buckets: Annotated[int, about("its buckets of distance", ge=8)] = 320
    relative_max_distance: Annotated[int, about("frames from which on all distances are alike", ge=8)] = 800


class Block(nn.Module):
    """Self-attention and feed-forward, each with its residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout, config.relative_bias)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def feed_forward(self, x_BFD: Tensor) -> Tensor:
        out: Tensor = self.ffn_out(self.activation_dropout(F.gelu(self.ffn_in(x_BFD))))
        return out

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The block's output, and the feed-forward part of it before the residual sum."""
        if self.pre:
            x_BFD = x_BFD + self.dropout(self.attention(self.attention_norm(x_BFD), context))
            ffn_BFD = self.feed_forward(self.ffn_norm(x_BFD))
            return x_BFD + self.dropout(ffn_BFD), ffn_BFD
        x_BFD = self.attention_norm(x_BFD + self.dropout(self.attention(x_BFD, context)))
        ffn_BFD = self.feed_forward(x_BFD)
        return self.ffn_norm(x_BFD + self.dropout(ffn_BFD)), ffn_BFD


class Transformer(BlockStack):
    def __init__(self, config: Config) -> None:
        super().__init__(config, rotary=config.positions == "rope")
        self.pre = config.norm == "pre"
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.positions = _positions(config)
        if config.relative_bias and config.attention == "local_global":
            raise ValueError("encoder.relative_bias=true needs encoder.attention=full or chunked, not local_global")
        self.relative_bias = (
            RelativeBias(config.heads, config.relative_buckets, config.relative_max_distance)
            if config.relative_bias
            else None
        )

    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        x_BFD = frames.x_BFD
        if self.positions is not None:
            x_BFD = x_BFD + self.position_features(frames)
        if not self.pre:
            x_BFD = self.norm(x_BFD)
        bias_HFF = self.relative_bias(x_BFD.shape[1]) if self.relative_bias is not None else None
        output = self.run_blocks(self.dropout(x_BFD), frames, ctx, bias_HFF)
        return self.norm_last(output, self.norm) if self.pre else output

    def position_features(self, frames: Frames) -> Tensor:
        """The positional convolution's output; frames that were taken out count as silence in their places."""
        assert self.positions is not None
        if frames.places_BF is None:
            found: Tensor = self.positions(frames.x_BFD)
            return found
        index = frames.places_BF[:, :, None].expand_as(frames.x_BFD)
        x_BFD = frames.x_BFD.masked_fill(~frames.valid_BF()[:, :, None], 0.0)
        grid_BFD = x_BFD.new_zeros(len(index), int(frames.places_BF.max()) + 1, self.dim)
        # added, not set: padding points at the last place and must not wipe it out
        return torch.gather(self.positions(grid_BFD.scatter_add(1, index, x_BFD)), 1, index)


def _positions(config: Config) -> nn.Module | None:
    kernel, groups = config.conv_positions_kernel, config.conv_positions_groups
    if config.positions == "conv":
        return ConvPositions(config.dim, kernel, groups)
    if config.positions == "conv_stack":
        return ConvPositionsStack(config.dim, kernel, groups, config.conv_positions_depth)
    return None


def build(config: Config) -> Transformer:
    return Transformer(config)
