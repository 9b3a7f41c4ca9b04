"""Transformer encoder: post-norm (BASE), pre-norm (LARGE); positions by convolution or rotation."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.keyed_random import keyed_rng
from data_pipeline.schema import about, config
from pretrain.nn.attention import SelfAttention, padding_mask
from pretrain.nn.positions import ConvPositions, rotary_angles
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
        Literal["conv", "rope", "none"],
        about("one wide convolution, or rotary angles in each attention; a symmetric convolution cannot stream"),
    ] = "conv"
    conv_positions_kernel: Annotated[int, about("taps of the positional convolution", ge=1)] = 128
    conv_positions_groups: Annotated[int, about("its groups; must divide dim", ge=1)] = 16
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
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def feed_forward(self, x_BFD: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.ffn_out(self.activation_dropout(F.gelu(self.ffn_in(x_BFD)))))
        return out

    def forward(self, x_BFD: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.pre:
            x_BFD = x_BFD + self.dropout(self.attention(self.attention_norm(x_BFD), mask, rotary))
            return x_BFD + self.feed_forward(self.ffn_norm(x_BFD))
        x_BFD = self.attention_norm(x_BFD + self.dropout(self.attention(x_BFD, mask, rotary)))
        out: Tensor = self.ffn_norm(x_BFD + self.feed_forward(x_BFD))
        return out


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
        self.positions = (
            ConvPositions(config.dim, config.conv_positions_kernel, config.conv_positions_groups)
            if config.positions == "conv"
            else None
        )

    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        mask = padding_mask(frames.valid_BF())
        x_BFD = frames.x_BFD
        if self.positions is not None:
            x_BFD = x_BFD + self.positions(x_BFD)
        if not self.pre:
            x_BFD = self.norm(x_BFD)
        x_BFD = self.dropout(x_BFD)
        rotary = rotary_angles(x_BFD.shape[1], self.head_dim, x_BFD.device) if self.rotary else None
        layers = [x_BFD]
        for block, kept in zip(self.blocks, self.kept_blocks(ctx), strict=True):
            if kept:
                x_BFD = self.run_block(block, x_BFD, mask, rotary)
            layers.append(x_BFD)
        if self.pre:
            layers[-1] = self.norm(x_BFD)
        return EncoderOutput(tuple(layers), frames.lengths_B, frames.rate_hz)

    def run_block(
        self, block: nn.Module, x_BFD: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """One block, checkpointed if asked for."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, x_BFD, mask, rotary, use_reentrant=False)
            return again
        out: Tensor = block(x_BFD, mask, rotary)
        return out

    def kept_blocks(self, ctx: StepContext | None) -> list[bool]:
        """Layer drop of this step, keyed by (seed, step), so that all ranks and micro-batches agree."""
        if not self.training or ctx is None or self.layer_drop == 0:
            return [True] * self.n_layers
        draws = keyed_rng(ctx.seed, ctx.step, "layer_drop").random(self.n_layers)
        kept: list[bool] = (draws >= self.layer_drop).tolist()
        return kept


def build(config: Config) -> Transformer:
    return Transformer(config)
