"""What encoders made of equal blocks share: layer drop, checkpointing, attention patterns, collecting layers."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.keyed_random import keyed_rng
from data_pipeline.schema import about, config
from pretrain.nn.attention import AttentionContext, chunk_mask, padding_mask
from pretrain.nn.positions import rotary_angles
from pretrain.types import Encoder, EncoderOutput, Frames, StepContext


@config
class StackConfig:
    """Fields that every encoder of this kind has."""

    dim: Annotated[int, about("channels", ge=1)] = 768
    layers: Annotated[int, about("blocks", ge=1)] = 12
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 12
    ffn_dim: Annotated[int, about("inner channels of a feed-forward part", ge=1)] = 3072
    dropout: Annotated[float, about("dropout of each residual branch and of the input", ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, about("dropout of attention weights", ge=0, lt=1)] = 0.1
    activation_dropout: Annotated[float, about("dropout inside the feed-forward part", ge=0, lt=1)] = 0.0
    layer_drop: Annotated[float, about("probability to skip a block, the same on all ranks in a step", ge=0, lt=1)] = (
        0.05
    )
    attention: Annotated[
        Literal["full", "local_global", "chunked"],
        about("who attends to whom: all; neighbours, with every n-th block full; the own chunk and those before it"),
    ] = "full"
    window: Annotated[int, about("local_global: frames that a local block sees, half on each side", ge=2)] = 64
    full_every: Annotated[int, about("local_global: every so many blocks attend to all", ge=1)] = 3
    registers: Annotated[int, about("local_global: learned frames that all attend to and that attend to all", ge=0)] = 0
    chunk_frames: Annotated[
        tuple[int, ...],
        about("chunked: chunk lengths, drawn for each update in training; the first is used otherwise; 0 is no limit"),
    ] = (16, 8, 32, 0)
    left_chunks: Annotated[int, about("chunked: chunks before the own one that are seen; -1: all", ge=-1)] = -1


class BlockStack(Encoder):
    """Subclasses set `blocks`, each `(x_BFD, AttentionContext) -> (x_BFD, ffn_BFD)`, and call `run_blocks`."""

    blocks: nn.ModuleList

    def __init__(self, config: StackConfig, rotary: bool) -> None:
        super().__init__()
        self.stack_config = config
        self.dim, self.n_layers = config.dim, config.layers
        self.head_dim = config.dim // config.heads
        self.rotary = rotary
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels per head, not {self.head_dim}")
        self.n_registers = config.registers if config.attention == "local_global" else 0
        self.registers_RD = nn.Parameter(0.02 * torch.randn(self.n_registers, config.dim)) if self.n_registers else None

    def run_blocks(
        self, x_BFD: Tensor, frames: Frames, ctx: StepContext | None, bias_HFF: Tensor | None = None
    ) -> EncoderOutput:
        """All blocks on x_BFD, whose padding is that of `frames`. The last layer is not normed here."""
        R = self.n_registers
        valid_BF = frames.valid_BF()
        if self.registers_RD is not None:
            registers_BRD = self.registers_RD.to(x_BFD.dtype).expand(len(x_BFD), R, self.dim)
            x_BFD = torch.cat([registers_BRD, x_BFD], dim=1)
            valid_BF = nn.functional.pad(valid_BF, (R, 0), value=True)
        full, local = self.contexts(valid_BF, frames.places_BF, ctx, bias_HFF)
        layers, ffn_layers = [x_BFD[:, R:]], []
        for number, kept in enumerate(self.kept_blocks(ctx)[: self.stop_after]):
            if kept:
                context = full if (number + 1) % self.stack_config.full_every == 0 else local
                x_BFD, ffn_BFD = self.run_block(self.blocks[number], x_BFD, context)
                if self.keep_ffn:
                    ffn_layers.append(ffn_BFD[:, R:])
            layers.append(x_BFD[:, R:])
        return EncoderOutput(tuple(layers), frames.lengths_B, frames.rate_hz, tuple(ffn_layers))

    def contexts(
        self, valid_BF: Tensor, places_BF: Tensor | None, ctx: StepContext | None, bias_HFF: Tensor | None
    ) -> tuple[AttentionContext, AttentionContext]:
        """What full and local blocks attend with, computed once for all of them."""
        config, R = self.stack_config, self.n_registers
        mask, n_frames, device = padding_mask(valid_BF), valid_BF.shape[1], valid_BF.device
        places = torch.arange(n_frames - R, device=device) if places_BF is None else places_BF
        rotary = rotary_angles(places, self.head_dim, skip=R) if self.rotary else None
        if config.attention == "chunked":
            mask = chunk_mask(n_frames, self.chunk_length(ctx), config.left_chunks, mask, device)
        full = AttentionContext(mask, rotary, bias_HFF, valid_BF, n_registers=R)
        if config.attention != "local_global":
            return full, full
        return full, full._replace(reach=config.window // 2)

    def chunk_length(self, ctx: StepContext | None) -> int:
        """Chunk length of this update, keyed by (seed, step)."""
        choices = self.stack_config.chunk_frames
        if not self.training or ctx is None or len(choices) == 1:
            return choices[0]
        return choices[int(keyed_rng(ctx.seed, ctx.step, "chunk").integers(len(choices)))]

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
        rate = self.stack_config.layer_drop
        if not self.training or ctx is None or rate == 0:
            return [True] * self.n_layers
        kept: list[bool] = (keyed_rng(ctx.seed, ctx.step, "layer_drop").random(self.n_layers) >= rate).tolist()
        return kept

    def norm_last(self, output: EncoderOutput, norm: nn.Module) -> EncoderOutput:
        """The output with its last layer normed (pre-norm encoders), unless the stack stopped early."""
        if self.stop_after is not None:
            return output
        return output._replace(layers=(*output.layers[:-1], norm(output.layers[-1])))


def zero_context_padding(x_BFD: Tensor, context: AttentionContext) -> Tensor:
    """Zeros beyond each length, for convolutions over time inside a block."""
    assert context.valid_BF is not None
    return x_BFD if context.mask is None else x_BFD.masked_fill(~context.valid_BF[:, :, None], 0.0)
