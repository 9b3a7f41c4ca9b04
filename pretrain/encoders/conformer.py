"""Conformer: feed-forward, attention, convolution, feed-forward (arXiv 2005.08100); FastConformer with kernel 9."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.schema import about, config
from pretrain.nn.attention import AttentionContext, SelfAttention
from pretrain.nn.dropout import Dropout
from pretrain.nn.stack import BlockStack, StackConfig, zero_context_padding
from pretrain.types import EncoderOutput, Frames, StepContext


@config
class Config(StackConfig):
    name: Literal["conformer"] = "conformer"
    dim: Annotated[int, about("channels", ge=1)] = 576
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 8
    ffn_dim: Annotated[int, about("inner channels of a feed-forward part", ge=1)] = 2304
    kernel: Annotated[int, about("taps of the depthwise convolution; odd", ge=1)] = 31
    causal: Annotated[bool, about("the convolution sees no later frames (needed to stream)")] = False
    positions: Annotated[Literal["rope", "none"], about("rotary angles, or only what the convolutions tell")] = "rope"


class FeedForward(nn.Sequential):
    """Norm → linear → SiLU → linear."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, config.ffn_dim),
            nn.SiLU(),
            Dropout(config.activation_dropout),
            nn.Linear(config.ffn_dim, config.dim),
        )


class Convolution(nn.Module):
    """Norm → gated linear unit → depthwise convolution → norm → SiLU → linear.

    A layer norm stands where the paper has a batch norm, which would couple the samples of a batch.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.kernel % 2 == 0:
            raise ValueError(f"encoder.kernel={config.kernel} must be odd")
        self.before = (config.kernel - 1) if config.causal else config.kernel // 2
        self.after = 0 if config.causal else config.kernel // 2
        self.norm = nn.LayerNorm(config.dim)
        self.gated = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = nn.Conv1d(config.dim, config.dim, config.kernel, groups=config.dim)
        self.depthwise_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> Tensor:
        R = context.n_registers  # registers have no neighbours in time
        x_BFD = zero_context_padding(F.glu(self.gated(self.norm(x_BFD)), dim=2), context)
        frames_BDF = F.pad(x_BFD[:, R:].transpose(1, 2), (self.before, self.after))
        y_BFD = F.pad(self.depthwise(frames_BDF).transpose(1, 2), (0, 0, R, 0))
        out: Tensor = self.out(F.silu(self.depthwise_norm(y_BFD)))
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ffn_first = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout)
        self.convolution = Convolution(config)
        self.ffn_second = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BFD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The block's output, and its last feed-forward part before the residual sum."""
        x_BFD = x_BFD + 0.5 * self.dropout(self.ffn_first(x_BFD))
        x_BFD = x_BFD + self.dropout(self.attention(self.attention_norm(x_BFD), context))
        x_BFD = x_BFD + self.dropout(self.convolution(x_BFD, context))
        ffn_BFD = self.ffn_second(x_BFD)
        return self.norm(x_BFD + 0.5 * self.dropout(ffn_BFD)), ffn_BFD


class Conformer(BlockStack):
    """Each block ends with its own norm, so the last layer needs no further one."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, rotary=config.positions == "rope")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)

    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        return self.run_blocks(self.dropout(frames.x_BFD), frames, ctx)


def build(config: Config) -> Conformer:
    return Conformer(config)
