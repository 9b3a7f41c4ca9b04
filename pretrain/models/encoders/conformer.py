"""Conformer: feed-forward, attention, convolution, feed-forward (arXiv 2005.08100); FastConformer with kernel 9."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from pretrain.interfaces.frames import BlockGates, EncoderOutput, Frames, StepContext
from pretrain.interfaces.streaming import BlockMemory, EncoderState, Obstacle
from pretrain.nn.attention import SelfAttention
from pretrain.nn.attention_patterns import AttentionContext
from pretrain.nn.block_stack import Residual, over_time
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.packing import Packing
from pretrain.nn.stack_config import StackConfig, Width
from pretrain.nn.streaming_stack import StreamingStack


@config
class Config(StackConfig):
    name: Literal["conformer"] = "conformer"
    dim: Annotated[int, about("channels", ge=1)] = 576
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 8
    ffn_dim: Annotated[int, about("inner channels of a feed-forward part", ge=1)] = 2304
    kernel: Annotated[int, about("taps of the depthwise convolution; odd", ge=1)] = 31
    causal: Annotated[
        bool, about("the convolution uses no later frames (streaming needs this or chunk_convolution)")
    ] = False
    chunk_convolution: Annotated[
        bool, about("the convolution uses later frames of its own attention chunk only (arXiv 2304.09325)")
    ] = False
    positions: Annotated[Literal["rope", "none"], about("rotary positions, or none but the convolutions")] = "rope"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "rope":
            self.refuse_odd_heads()
        if self.kernel % 2 == 0:
            refuse("kernel", self.kernel, f"must be odd; take {self.kernel + 1}")
        if self.chunk_convolution and (self.causal or self.attention != "chunked"):
            refuse("chunk_convolution", True, "needs encoder.attention=chunked and encoder.causal=false")


class FeedForward(nn.Sequential):
    """Norm → linear → SiLU → linear."""

    def forward(self, x_BFD: Tensor, gate_C: Tensor | None = None) -> Tensor:
        """Returns the output, (B, F, D); `gate_C` multiplies the inner channels."""
        norm, inner, activation, dropout, outer = self
        y_BFC = dropout(activation(inner(norm(x_BFD))))
        out: Tensor = outer(y_BFC if gate_C is None else y_BFC * gate_C.to(y_BFC.dtype))
        return out

    def __init__(self, config: Config, ffn_dim: int) -> None:
        super().__init__(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, ffn_dim),
            nn.SiLU(),
            Dropout(config.activation_dropout),
            nn.Linear(ffn_dim, config.dim),
        )


class Convolution(nn.Module):
    """Norm → gated linear unit → depthwise convolution → norm → SiLU → linear.

    A layer norm replaces the batch norm of the paper, which would couple the samples of a batch.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.chunkwise = config.chunk_convolution
        self.before = (config.kernel - 1) if config.causal else config.kernel // 2
        self.after = 0 if config.causal else config.kernel // 2
        self.norm = nn.LayerNorm(config.dim)
        self.gated = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = TimeConv(config.dim, config.dim, config.kernel, groups=config.dim)
        self.depthwise_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        def convolve(frames_BFD: Tensor) -> Tensor:
            return self.convolve(frames_BFD, context.pattern.chunk if self.chunkwise else 0)

        return self.after_convolution(over_time(F.glu(self.gated(self.norm(x_BFD)), dim=2), context, convolve))

    def step(self, x_BFD: Tensor, memory: BlockMemory, context: AttentionContext) -> tuple[Tensor, BlockMemory]:
        """Returns the output for the next chunk of a stream, (B, F, D), and the memory after it."""
        y_BFD = F.glu(self.gated(self.norm(x_BFD)), dim=2)
        if context.valid_BF is not None:
            y_BFD = y_BFD.masked_fill(~context.valid_BF[:, :, None], 0.0)
        row_BFD = torch.cat([memory.tail_BKD, y_BFD], dim=1)
        out_BFD = self.after_convolution(self.depthwise(F.pad(row_BFD, (0, 0, 0, self.after))))
        return out_BFD, memory._replace(tail_BKD=row_BFD[:, x_BFD.shape[1] :])

    def after_convolution(self, y_BFD: Tensor) -> Tensor:
        """Returns the module's output for the convolution's."""
        out: Tensor = self.out(F.silu(self.depthwise_norm(y_BFD)))
        return out

    def convolve(self, x_BFD: Tensor, chunk: int) -> Tensor:
        """Convolves (B, F, D) over time; with `chunk`, frames of later chunks count as zeros."""
        if chunk == 0:
            found: Tensor = self.depthwise(F.pad(x_BFD, (0, 0, self.before, self.after)))
            return found
        n_chunks = -(-x_BFD.shape[1] // chunk)
        spare = n_chunks * chunk - x_BFD.shape[1]
        windows_BNDW = F.pad(x_BFD, (0, 0, self.before, spare)).unfold(1, self.before + chunk, chunk)
        rows_RWD = F.pad(windows_BNDW.transpose(2, 3).flatten(0, 1), (0, 0, 0, self.after))
        joined: Tensor = self.depthwise(rows_RWD).reshape(x_BFD.shape[0], n_chunks * chunk, -1)
        return joined[:, : x_BFD.shape[1]]


class Block(nn.Module):
    """Conformer block (eq. 1): half feed-forward, attention, convolution, half feed-forward, norm."""

    def __init__(self, config: Config, width: Width) -> None:
        super().__init__()
        self.ffn_first = FeedForward(config, width.ffn_dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, width.heads, width.head_dim, config.attention_dropout)
        self.convolution = Convolution(config)
        self.ffn_second = FeedForward(config, width.ffn_dim)
        self.norm = nn.LayerNorm(config.dim)
        self.residual = Residual(config.dropout)

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Returns the block's output, and its last feed-forward part before the residual sum."""
        gate_C = None if context.gates is None else context.gates.channels[0]
        x_BFD = x_BFD + 0.5 * self.residual(self.ffn_first(x_BFD, gate_C), context, 0)
        x_BFD = x_BFD + self.residual(self.attention(self.attention_norm(x_BFD), context), context, 1)
        x_BFD = x_BFD + self.residual(self.convolution(x_BFD, context), context, 2)
        return self.after_convolution(x_BFD, context)

    def step(self, x_BFD: Tensor, memory: BlockMemory, context: AttentionContext) -> tuple[Tensor, BlockMemory]:
        """Returns the block's output for the next chunk of a stream, and the memory after it."""
        x_BFD = x_BFD + 0.5 * self.ffn_first(x_BFD)
        attended_BFD, memory = self.attention.step(self.attention_norm(x_BFD), memory, context)
        x_BFD = x_BFD + attended_BFD
        convolved_BFD, memory = self.convolution.step(x_BFD, memory, context)
        return self.after_convolution(x_BFD + convolved_BFD, context)[0], memory

    def after_convolution(self, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Returns the block's output, and its last feed-forward part before the residual sum."""
        ffn_BFD = self.ffn_second(x_BFD, None if context.gates is None else context.gates.channels[1])
        return self.norm(x_BFD + 0.5 * self.residual(ffn_BFD, context, 3)), ffn_BFD


class Conformer(StreamingStack):
    """Conformer blocks; each ends with its own norm, so the last layer needs no further one."""

    branches = 4
    feed_forwards = (("ffn_first.1", "ffn_first.4"), ("ffn_second.1", "ffn_second.4"))

    def __init__(self, config: Config) -> None:
        super().__init__(config, rotary=config.positions == "rope")
        self.config = config
        self.blocks = nn.ModuleList(Block(config, width) for width in config.block_widths)
        self.dropout = Dropout(config.dropout)
        self.gap = self.tail = config.kernel - 1 if config.causal else config.kernel // 2
        self.chunk_convolution = config.chunk_convolution

    def encode(
        self,
        frames: Frames,
        ctx: StepContext | None,
        packing: Packing | None,
        gates: tuple[BlockGates, ...],
        prompts_BLPD: Tensor | None,
    ) -> EncoderOutput:
        x_BFD = self.dropout(frames.x_BFD)
        return self.run_blocks(x_BFD, frames, ctx, packing, gates=gates, prompts_BLPD=prompts_BLPD)

    def obstacles(self) -> list[Obstacle]:
        found = super().obstacles()
        if not self.config.causal and not self.config.chunk_convolution:
            reason = "its convolution is symmetric; train with encoder.causal=true or encoder.chunk_convolution=true"
            found.append(Obstacle("encoder.causal", False, reason))
        return found

    def step(self, frames: Frames, state: EncoderState, left_chunks: int) -> tuple[EncoderOutput, EncoderState]:
        return self.step_blocks(frames.x_BFD, frames, state, left_chunks)


def build(config: Config) -> Conformer:
    return Conformer(config)
