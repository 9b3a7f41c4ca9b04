"""Transformer encoder: post-norm (BASE), pre-norm (LARGE); positions by convolution or rotation."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.keyed_random import keyed_rng
from data_pipeline.schema import about, config
from pretrain.nn.attention import AttentionContext, RelativeBias, SelfAttention, padding_mask
from pretrain.nn.positions import ConvPositions, ConvPositionsStack, rotary_angles
from pretrain.types import Encoder, EncoderOutput, Frames, StepContext


@config
class Config:
    name: Literal["transformer"] = "transformer"
    dim: Annotated[int, about("channels", ge=1)] = 768
    layers: Annotated[int, about("blocks", ge=1)] = 12
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 12
    ffn_dim: Annotated[int, about("inner channels of the feed-forward part", ge=1)] = 3072
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
    dropout: Annotated[float, about("dropout of each residual branch and of the input", ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, about("dropout of attention weights", ge=0, lt=1)] = 0.1
    activation_dropout: Annotated[float, about("dropout inside the feed-forward part", ge=0, lt=1)] = 0.0
    layer_drop: Annotated[float, about("probability to skip a block, the same on all ranks in a step", ge=0, lt=1)] = (
        0.05
    )


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
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

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


class Transformer(Encoder):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dim, self.n_layers = config.dim, config.layers
        self.layer_drop, self.head_dim = config.layer_drop, config.dim // config.heads
        self.pre = config.norm == "pre"
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = config.positions == "rope"
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"encoder.positions=rope needs an even number of channels per head, not {self.head_dim}")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.positions = _positions(config)
        self.relative_bias = (
            RelativeBias(config.heads, config.relative_buckets, config.relative_max_distance)
            if config.relative_bias
            else None
        )

    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        x_BFD = frames.x_BFD
        context = self.attention_context(frames)
        if self.positions is not None:
            x_BFD = x_BFD + self.positions(x_BFD)
        if not self.pre:
            x_BFD = self.norm(x_BFD)
        x_BFD = self.dropout(x_BFD)
        layers, ffn_layers = [x_BFD], []
        for block, kept in list(zip(self.blocks, self.kept_blocks(ctx), strict=True))[: self.stop_after]:
            if kept:
                x_BFD, ffn_BFD = self.run_block(block, x_BFD, context)
                if self.keep_ffn:
                    ffn_layers.append(ffn_BFD)
            layers.append(x_BFD)
        if self.pre and self.stop_after is None:
            layers[-1] = self.norm(x_BFD)
        return EncoderOutput(tuple(layers), frames.lengths_B, frames.rate_hz, tuple(ffn_layers))

    def attention_context(self, frames: Frames) -> AttentionContext:
        """Padding mask, rotary angles and position bias, computed once for all blocks."""
        n_frames, device = frames.x_BFD.shape[1], frames.x_BFD.device
        return AttentionContext(
            padding_mask(frames.valid_BF()),
            rotary_angles(n_frames, self.head_dim, device) if self.rotary else None,
            self.relative_bias(n_frames) if self.relative_bias is not None else None,
        )

    def run_block(self, block: nn.Module, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """One block, checkpointed if asked for."""
        out: tuple[Tensor, Tensor]
        if self.activation_checkpointing and torch.is_grad_enabled():
            out = checkpoint(block, x_BFD, context, use_reentrant=False)
        else:
            out = block(x_BFD, context)
        return out

    def kept_blocks(self, ctx: StepContext | None) -> list[bool]:
        """Layer drop of this step, keyed by (seed, step), so that all ranks and micro-batches agree."""
        if not self.training or ctx is None or self.layer_drop == 0:
            return [True] * self.n_layers
        draws = keyed_rng(ctx.seed, ctx.step, "layer_drop").random(self.n_layers)
        kept: list[bool] = (draws >= self.layer_drop).tolist()
        return kept


def _positions(config: Config) -> nn.Module | None:
    kernel, groups = config.conv_positions_kernel, config.conv_positions_groups
    if config.positions == "conv":
        return ConvPositions(config.dim, kernel, groups)
    if config.positions == "conv_stack":
        return ConvPositionsStack(config.dim, kernel, groups, config.conv_positions_depth)
    return None


def build(config: Config) -> Transformer:
    return Transformer(config)
