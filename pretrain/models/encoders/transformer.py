"""Transformer encoder: post-norm (BASE), pre-norm (LARGE); positions by convolution or rotation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from pretrain.interfaces.frames import BlockGates, EncoderOutput, Frames, StepContext
from pretrain.interfaces.streaming import BlockMemory, EncoderState, Obstacle
from pretrain.nn.attention import RelativeBias, SelfAttention
from pretrain.nn.attention_patterns import AttentionContext
from pretrain.nn.block_stack import Residual
from pretrain.nn.dropout import Dropout
from pretrain.nn.numerics import zero_padding
from pretrain.nn.packing import Packing, TimeGrid
from pretrain.nn.positions import ConvPositions, ConvPositionsStack
from pretrain.nn.stack_config import StackConfig, Width
from pretrain.nn.streaming_stack import StreamingStack


@config
class Config(StackConfig):
    name: Literal["transformer"] = "transformer"
    norm: Annotated[Literal["post", "pre"], about("layer norm after each residual sum (BASE) or before (LARGE)")] = (
        "post"
    )
    final_norm: Annotated[
        bool, about("pre: normalise the last layer; false after the last blocks were cut off (auricle compress)")
    ] = True
    positions: Annotated[
        Literal["conv", "conv_stack", "rope", "none"],
        about("one wide convolution (wav2vec 2.0), several narrow ones (data2vec), or rotary angles, which can stream"),
    ] = "conv"
    conv_positions_kernel: Annotated[int, about("taps of each positional convolution", ge=1)] = 128
    conv_positions_groups: Annotated[int, about("its groups; must divide dim", ge=1)] = 16
    conv_positions_depth: Annotated[int, about("convolutions in a conv_stack", ge=1)] = 5
    relative_bias: Annotated[
        bool, about("gated relative position bias in each attention, in addition to positions (WavLM)")
    ] = False
    relative_buckets: Annotated[int, about("its buckets of distance", ge=8)] = 320
    relative_max_distance: Annotated[int, about("frames beyond which all distances share a bucket", ge=8)] = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        groups, kernel = self.conv_positions_groups, self.conv_positions_kernel
        if self.positions == "rope":
            self.refuse_odd_heads()
        if self.positions in ("conv", "conv_stack") and self.dim % groups:
            refuse(
                "conv_positions_groups",
                groups,
                f"must divide encoder.dim={self.dim}; take {math.gcd(self.dim, groups)}",
            )
        if self.positions == "conv_stack" and kernel % 2 == 0:
            refuse("conv_positions_kernel", kernel, f"must be odd for positions=conv_stack; take {kernel + 1}")
        if self.relative_bias and (self.attention == "local_global" or self.half_rate_blocks):
            refuse("relative_bias", True, "needs encoder.attention=full or chunked, and encoder.half_rate_blocks=0")
        if not self.heads_may_differ and any(heads != self.heads for heads, _ in self.widths):
            needed = f"needs encoder.heads={self.heads} in each pair: encoder.relative_bias is shared by all blocks"
            refuse("widths", [list(pair) for pair in self.widths], needed)

    @property
    def heads_may_differ(self) -> bool:
        """False with a relative position bias, which all blocks share."""
        return not self.relative_bias

    @property
    def without_last_blocks(self) -> dict[str, object]:
        """`final_norm` of a pre-norm encoder, which normalises its last layer only."""
        return {"final_norm": False} if self.norm == "pre" else {}


class Block(nn.Module):
    """Self-attention and feed-forward, each with its residual."""

    def __init__(self, config: Config, width: Width) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = SelfAttention(
            config.dim, width.heads, width.head_dim, config.attention_dropout, config.relative_bias
        )
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, width.ffn_dim)
        self.ffn_out = nn.Linear(width.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.residual = Residual(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def feed_forward(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        y_BFC = self.activation_dropout(F.gelu(self.ffn_in(x_BFD)))
        if context.gates is not None:
            y_BFC = y_BFC * context.gates.channels[0].to(y_BFC.dtype)
        out: Tensor = self.ffn_out(y_BFC)
        return out

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Returns the block's output, and its feed-forward part before the residual sum."""
        attended_BFD = self.attention(self.attention_norm(x_BFD) if self.pre else x_BFD, context)
        return self.after_attention(x_BFD, attended_BFD, context)

    def step(self, x_BFD: Tensor, memory: BlockMemory, context: AttentionContext) -> tuple[Tensor, BlockMemory]:
        """Returns the block's output for the next chunk of a stream, and the memory after it."""
        attended_BFD, memory = self.attention.step(self.attention_norm(x_BFD) if self.pre else x_BFD, memory, context)
        return self.after_attention(x_BFD, attended_BFD, context)[0], memory

    def after_attention(self, x_BFD: Tensor, attended_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Returns the block's output, and its feed-forward part before the residual sum.

        Args:
            x_BFD: the block's input.
            attended_BFD: the attention's output.
            context: valid frames, factors of the residual branches and gates.
        """
        x_BFD = x_BFD + self.residual(attended_BFD, context, 0)
        if self.pre:
            ffn_BFD = self.feed_forward(self.ffn_norm(x_BFD), context)
            return x_BFD + self.residual(ffn_BFD, context, 1), ffn_BFD
        x_BFD = self.attention_norm(x_BFD)
        ffn_BFD = self.feed_forward(x_BFD, context)
        return self.ffn_norm(x_BFD + self.residual(ffn_BFD, context, 1)), ffn_BFD


class Transformer(StreamingStack):
    """Transformer encoder of wav2vec 2.0 (arXiv 2006.11477), HuBERT, WavLM and data2vec."""

    branches = 2
    feed_forwards = (("ffn_in", "ffn_out"),)

    def __init__(self, config: Config) -> None:
        super().__init__(config, rotary=config.positions == "rope")
        self.config = config
        self.pre = config.norm == "pre"
        # only the first of several convolutions has zeros as padding, as in released models; packed rows are exact
        self.couples = frozenset({"padding"}) if config.positions == "conv_stack" else frozenset()
        self.blocks = nn.ModuleList(Block(config, width) for width in config.block_widths)
        self.norm = nn.LayerNorm(config.dim) if config.final_norm or not self.pre else nn.Identity()
        self.dropout = Dropout(config.dropout)
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

    def encode(
        self,
        frames: Frames,
        ctx: StepContext | None,
        packing: Packing | None,
        gates: tuple[BlockGates, ...],
        prompts_BLPD: Tensor | None,
    ) -> EncoderOutput:
        x_BFD = frames.x_BFD
        if self.positions is not None:
            x_BFD = x_BFD + self.position_features(frames, packing)
        if not self.pre:
            x_BFD = self.norm(x_BFD)
        bias_HFF = None
        if self.relative_bias is not None:
            bias_HFF = self.relative_bias(max(packing.lengths) if packing else x_BFD.shape[1])
        output = self.run_blocks(
            self.dropout(x_BFD), frames, ctx, packing=packing, bias_HFF=bias_HFF, gates=gates, prompts_BLPD=prompts_BLPD
        )
        return self.norm_last(output, self.norm) if self.pre else output

    def obstacles(self) -> list[Obstacle]:
        found = super().obstacles()
        if self.config.positions in ("conv", "conv_stack"):
            reason = "its convolution is symmetric and needs later frames; train with encoder.positions=rope"
            found.append(Obstacle("encoder.positions", self.config.positions, reason))
        if self.config.relative_bias:
            reason = "is not computed in a stream; train with encoder.positions=rope"
            found.append(Obstacle("encoder.relative_bias", True, reason))
        return found

    def step(self, frames: Frames, state: EncoderState, left_chunks: int) -> tuple[EncoderOutput, EncoderState]:
        x_BFD = frames.x_BFD if self.pre else self.norm(frames.x_BFD)
        output, state = self.step_blocks(x_BFD, frames, state, left_chunks)
        return self.norm_last(output, self.norm) if self.pre else output, state

    def position_features(self, frames: Frames, packing: Packing | None) -> Tensor:
        """Returns the positional convolution's output; removed frames count as zeros at their time index."""
        assert self.positions is not None
        x_BFD, places_BF = frames.x_BFD, frames.places_BF
        if places_BF is None:
            found: Tensor = self.positions(x_BFD)
            return found
        if packing is None:
            rows, width = len(x_BFD), int(places_BF.max()) + 1
            starts_B1 = torch.arange(rows, device=x_BFD.device)[:, None] * width
            grid = TimeGrid(rows, width, (starts_B1 + places_BF).flatten())
            x_BFD = zero_padding(x_BFD, frames.lengths_B)
        else:
            gap, places = self.positions.kernel // 2, (places_BF, packing.spans)
            grid = TimeGrid.spaced(packing.lengths, gap, x_BFD.device, places=places)
        return grid.collect(self.positions(grid.spread(x_BFD), grid.inside_RW1), x_BFD)


def _positions(config: Config) -> ConvPositions | ConvPositionsStack | None:
    kernel, groups = config.conv_positions_kernel, config.conv_positions_groups
    if config.positions == "conv":
        return ConvPositions(config.dim, kernel, groups)
    if config.positions == "conv_stack":
        return ConvPositionsStack(config.dim, kernel, groups, config.conv_positions_depth)
    return None


def build(config: Config) -> Transformer:
    return Transformer(config)
