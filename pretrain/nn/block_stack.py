"""Base class of encoders of equal blocks: packing, layer drop, checkpointing, attention patterns, all layer outputs."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from pretrain.interfaces.frames import BlockGates, EncoderOutput, Frames, StepContext, valid_frames
from pretrain.interfaces.models import Encoder
from pretrain.nn.activation_checkpointing import run_checkpointed
from pretrain.nn.attention_patterns import AttentionContext, Pattern, flex_mask
from pretrain.nn.dropout import Dropout
from pretrain.nn.half_rate import HalfRate, repeated
from pretrain.nn.numerics import zero_padding
from pretrain.nn.packing import Packing, TimeGrid
from pretrain.nn.positions import rotary_angles
from pretrain.nn.stack_config import StackConfig


class Level(NamedTuple):
    """Frame lengths and attention contexts at one frame rate.  documents: frames of each packed utterance, or empty.

    prompts_LUPD: learned frames of each block and utterance, if any.
    """

    lengths_B: Tensor
    places_BF: Tensor | None
    documents: tuple[int, ...]
    full: AttentionContext = AttentionContext()
    local: AttentionContext = AttentionContext()
    prompts_LUPD: Tensor | None = None


class Draws(NamedTuple):
    """Random draws of a pass.  blocks: whether each is kept.  branches_LKB: factors of residual branches, if any.

    gates: factors of heads and inner channels of each block, or empty.
    """

    blocks: list[bool]
    branches_LKB: Tensor | None
    gates: tuple[BlockGates, ...] = ()


class Ran(NamedTuple):
    """Result of some blocks.  x_BFD: registers and frames.  layers, ffn_layers: outputs of each, without registers."""

    x_BFD: Tensor
    layers: list[Tensor]
    ffn_layers: list[Tensor]


class BlockStack(Encoder):
    """Base class of encoders of equal blocks.

    Subclasses set `blocks`, each `(x_BFD, AttentionContext) -> (x_BFD, ffn_BFD)`, and implement `encode`.

    Args:
        config: fields that all such encoders have.
        rotary: whether attention uses rotary positions.
    """

    blocks: nn.ModuleList
    feed_forwards: tuple[tuple[str, str], ...]
    """Names, within a block, of the first and the last linear layer of each feed-forward part; attention is
    `attention`, a SelfAttention."""
    branches: int
    """Residual branches per block, which stochastic depth may leave out."""
    gap: int = 0
    """Zeros that the convolutions inside blocks need between packed utterances."""
    chunk_convolution: bool = False
    """Whether convolutions inside blocks end at the chunk, so that packed utterances must start with one."""
    stream: Pattern | None = None
    """Pattern outside of training, instead of the first of the config's chunks; for attention=chunked."""

    def __init__(self, config: StackConfig, rotary: bool) -> None:
        super().__init__()
        self.stack_config = config
        self.dim, self.n_layers = config.dim, config.layers
        self.head_dim = config.dim // config.heads
        self.rotary = rotary
        self.n_registers = config.registers if config.attention == "local_global" else 0
        self.registers_RD = nn.Parameter(0.02 * torch.randn(self.n_registers, config.dim)) if self.n_registers else None
        self.prompts_LPD: nn.Parameter | None = None
        self.half_rate = HalfRate(config.dim) if config.half_rate_blocks else None
        first = (config.layers - config.half_rate_blocks) // 2
        self.at_half_rate = range(first, first + config.half_rate_blocks)

    def add_prompts(self, count: int) -> None:
        """Gives each block `count` learned frames, which lead each row, after registers, and end with the block."""
        self.prompts_LPD = nn.Parameter(0.02 * torch.randn(self.n_layers, count, self.dim))

    def take_prompts(self) -> Tensor | None:
        taken, self.prompts_LPD = self.prompts_LPD, None
        return None if taken is None else taken.detach()

    def feed_forward_outputs(self) -> list[str]:
        return [f"blocks.{number}.{self.feed_forwards[-1][1]}" for number in range(self.n_layers)]

    def forward(
        self,
        frames: Frames,
        ctx: StepContext | None = None,
        gates: tuple[BlockGates, ...] = (),
        prompts_BLPD: Tensor | None = None,
    ) -> EncoderOutput:
        """Encodes frames, packed into one row if `packed` is set.

        Args:
            frames: (B, F, D) input frames, zero beyond each length.
            ctx: seed and step for the draws of a training step; None outside of training.
            gates: factors of heads and inner channels of each block; empty: all are 1. With fewer gates than blocks,
                the first blocks alone run, as with `stop_after`.
            prompts_BLPD: P frames for each row and block (Lester et al. 2021, in each block as Li and Liang 2021);
                None: those of `add_prompts` in all rows.

        Returns:
            The input of the first block and the output of each block, (B, F, D), zero beyond each length if packed.
        """
        if prompts_BLPD is None and self.prompts_LPD is not None:
            prompts_BLPD = self.prompts_LPD.expand(frames.x_BFD.shape[0], -1, -1, -1)
        if not self.packed:
            return self.encode(frames, ctx, None, gates, prompts_BLPD)
        B, F, _ = frames.x_BFD.shape
        packing = Packing.of(frames.lengths_B, F, frames.x_BFD.device, frames.places_BF)
        places_BF = torch.arange(F, device=frames.x_BFD.device).expand(B, F)
        places_1N = packing.pack(places_BF if frames.places_BF is None else frames.places_BF)
        row = Frames(packing.pack(frames.x_BFD), packing.total_1, frames.rate_hz, places_BF=places_1N)
        output = self.encode(row, ctx, packing, gates, prompts_BLPD)
        layers, ffn_layers = (tuple(map(packing.unpack, part)) for part in (output.layers, output.ffn_layers))
        return EncoderOutput(layers, frames.lengths_B, frames.rate_hz, ffn_layers)

    @abc.abstractmethod
    def encode(
        self,
        frames: Frames,
        ctx: StepContext | None,
        packing: Packing | None,
        gates: tuple[BlockGates, ...],
        prompts_BLPD: Tensor | None,
    ) -> EncoderOutput:
        """Returns all layers in the layout of `frames`: a row per utterance, or the single row of `packing`.

        Args:
            frames: (B, F, D) input, or the packed row (1, N, D).
            ctx: seed and step for the draws of a training step; None outside of training.
            packing: layout of the packed row; None for padded rows.
            gates: factors of heads and inner channels of each block; empty: all are 1.
            prompts_BLPD: P learned frames for each utterance and block, if any.
        """

    def run_blocks(
        self,
        x_BFD: Tensor,
        frames: Frames,
        ctx: StepContext | None,
        packing: Packing | None = None,
        bias_HFF: Tensor | None = None,
        gates: tuple[BlockGates, ...] = (),
        prompts_BLPD: Tensor | None = None,
    ) -> EncoderOutput:
        """Runs all blocks.

        Args:
            x_BFD: input of the first block, padded like `frames`.
            frames: lengths, frame rate and positions.
            ctx: seed and step for the draws of a training step.
            packing: the packing of a single row; None for padded rows.
            bias_HFF: relative position bias, if any.
            gates: factors of heads and inner channels of each block; empty: all are 1.
            prompts_BLPD: learned frames of each utterance and block, if any.

        Returns:
            All layers; the last one is not normalised (see `norm_last`).
        """
        prompts_LUPD = None if prompts_BLPD is None else prompts_BLPD.transpose(0, 1).to(x_BFD.dtype)
        level = Level(frames.lengths_B, frames.places_BF, packing.lengths if packing else (), prompts_LUPD=prompts_LUPD)
        level = self.with_contexts(level, x_BFD.shape[1], x_BFD.device, self.chunk_pattern(ctx), bias_HFF)
        branches_LKB = self.kept_branches(ctx, len(level.documents) or x_BFD.shape[0], x_BFD)
        draws = Draws(self.kept_blocks(ctx), branches_LKB, gates)
        layers = [x_BFD]
        if self.registers_RD is not None:
            registers_RD = self.registers_RD.to(x_BFD.dtype).repeat(max(1, len(level.documents)), 1)
            x_BFD = torch.cat([registers_RD.expand(x_BFD.shape[0], -1, -1), x_BFD], dim=1)
        if prompts_LUPD is not None:
            x_BFD = self.with_prompts(x_BFD, prompts_LUPD[0], self.n_registers, level)
        run = self.run_u_shape if self.half_rate is not None else self.run_some
        numbers = range(self.n_layers)[: self.stop_after]
        ran = run(numbers[: len(gates)] if gates else numbers, x_BFD, level, draws, ctx)
        return EncoderOutput((*layers, *ran.layers), frames.lengths_B, frames.rate_hz, tuple(ran.ffn_layers))

    def run_some(
        self, numbers: range, x_BFD: Tensor, level: Level, draws: Draws, ctx: StepContext | None = None
    ) -> Ran:
        """Runs the blocks with these indices.

        Args:
            numbers: indices of the blocks.
            x_BFD: leading frames (registers, prompts) and frames.
            level: lengths and attention contexts at this frame rate.
            draws: blocks to leave out, factors of branches, and gates.
            ctx: unused; the same arguments as of `run_u_shape`.
        """
        layers, ffn_layers, L = [], [], level.full.n_leading
        for number in numbers:
            if draws.blocks[number]:
                context = level.full if (number + 1) % self.stack_config.full_every == 0 else level.local
                if draws.branches_LKB is not None:
                    factors_KBF1 = per_frame(draws.branches_LKB[number], context)
                    context = context._replace(residual_KBF1=factors_KBF1)
                if draws.gates:
                    context = context._replace(gates=draws.gates[number])
                if level.prompts_LUPD is not None:
                    x_BFD = self.with_prompts(x_BFD, level.prompts_LUPD[number], context.n_registers, level)
                x_BFD, ffn_BFD = run_checkpointed(self.activation_checkpointing, self.blocks[number], x_BFD, context)
                if self.keep_ffn:
                    ffn_layers.append(ffn_BFD[:, L:])
            layers.append(x_BFD[:, L:])
        return Ran(x_BFD, layers, ffn_layers)

    def with_prompts(self, x_BFD: Tensor, prompts_UPD: Tensor, n_leading: int, level: Level) -> Tensor:
        """Returns registers, these prompts of each utterance, and frames.

        Args:
            x_BFD: leading frames of all utterances of a row, then its frames.
            prompts_UPD: prompts of each utterance, of all rows.
            n_leading: leading frames per utterance in `x_BFD`: registers, and the prompts of the block before.
            level: has the utterances of each row.
        """
        utterances, (B, _, D) = max(1, len(level.documents)), x_BFD.shape
        leading_URD = x_BFD[:, : n_leading * utterances].reshape(B * utterances, n_leading, D)[:, : self.n_registers]
        leading_BLD = torch.cat([leading_URD, prompts_UPD], dim=1).reshape(B, -1, D)
        return torch.cat([leading_BLD, x_BFD[:, n_leading * utterances :]], dim=1)

    def run_u_shape(self, numbers: range, x_BFD: Tensor, level: Level, draws: Draws, ctx: StepContext | None) -> Ran:
        """Runs the blocks with the middle ones at half the frame rate; the frames of their outputs are repeated.

        Args:
            numbers: indices of the blocks.
            x_BFD: leading frames (registers, prompts) and frames at the full rate.
            level: lengths and attention contexts at the full rate.
            draws: blocks to leave out, factors of branches, and gates.
            ctx: for the chunk of a chunked attention; None outside of training.
        """
        assert self.half_rate is not None
        L, middle = level.full.n_leading, self.at_half_rate
        first = self.run_some(numbers[: middle.start], x_BFD, level, draws)
        fine_BFD = first.x_BFD[:, L:]
        grid = TimeGrid.spaced(level.documents, 0, x_BFD.device, multiple=2) if level.documents else None
        half = self.half_level(level, grid, fine_BFD, ctx)
        joined_BFD = self.half_rate.down(zero_padding(fine_BFD, level.lengths_B), grid)
        inner = self.run_some(
            numbers[middle.start : middle.stop], torch.cat([first.x_BFD[:, :L], joined_BFD], dim=1), half, draws
        )
        layers = first.layers + [repeated(layer_BFD, fine_BFD, grid) for layer_BFD in inner.layers]
        ffn_layers = first.ffn_layers + [repeated(layer_BFD, fine_BFD, grid) for layer_BFD in inner.ffn_layers]
        fine_BFD = self.half_rate.up(inner.x_BFD[:, L:], fine_BFD, grid)
        if len(layers) == middle.stop:
            layers[-1] = fine_BFD
        last = self.run_some(numbers[middle.stop :], torch.cat([inner.x_BFD[:, :L], fine_BFD], dim=1), level, draws)
        return Ran(last.x_BFD, layers + last.layers, ffn_layers + last.ffn_layers)

    def half_level(self, level: Level, grid: TimeGrid | None, fine_BFD: Tensor, ctx: StepContext | None) -> Level:
        """Returns the level at half the frame rate; the time index of a pair is that of its first frame.

        `grid` is that of packed utterances (None for padded rows), `fine_BFD` the frames at the full rate.
        """
        places_BF = level.places_BF
        if grid is not None:
            assert places_BF is not None
            places_BF = grid.spread(places_BF[:, :, None])[:, :, 0]
        places_BF = None if places_BF is None else places_BF[:, ::2] / 2
        documents = tuple((n + 1) // 2 for n in level.documents)
        lengths_B = (level.lengths_B + 1) // 2 if grid is None else level.lengths_B.new_tensor([sum(documents)])
        half = Level(lengths_B, places_BF, documents, prompts_LUPD=level.prompts_LUPD)
        pattern = self.chunk_pattern(ctx)
        pattern = pattern._replace(chunk=pattern.chunk // 2)
        n_frames = sum(documents) or (fine_BFD.shape[1] + 1) // 2
        return self.with_contexts(half, n_frames, fine_BFD.device, pattern, None)

    def with_contexts(
        self, level: Level, n_frames: int, device: torch.device, pattern: Pattern, bias_HFF: Tensor | None
    ) -> Level:
        """Returns `level` with the attention contexts of full and local blocks, computed once for all blocks.

        `n_frames` are those of a row without leading ones; `bias_HFF` is a position bias of the attention logits.
        """
        config, documents = self.stack_config, level.documents
        n_leading = self.n_registers + (0 if level.prompts_LUPD is None else level.prompts_LUPD.shape[2])
        leading = n_leading * max(1, len(documents))
        multiple = max(1, pattern.chunk) if self.chunk_convolution else 1
        valid_BF = None
        if not documents:
            # a row without frames attends to its first padding frame: an empty softmax has no finite gradient
            attended_B = level.lengths_B.clamp(min=1)
            # an exported graph takes audio without padding and cannot branch on its values
            if not torch.compiler.is_exporting() and bool((attended_B < n_frames).any()):
                valid_BF = nn.functional.pad(valid_frames(attended_B, n_frames, device), (leading, 0), value=True)
        places = torch.arange(n_frames, device=device) if level.places_BF is None else level.places_BF
        full = AttentionContext(
            valid_BF,
            pattern,
            rotary_angles(places, self.head_dim, skip=leading) if self.rotary else None,
            bias_HFF if bias_HFF is None else nn.functional.pad(bias_HFF, (n_leading, 0, n_leading, 0)),
            n_leading,
            documents,
            TimeGrid.spaced(documents, self.gap, device, multiple) if documents and self.gap else None,
        )
        local = full._replace(pattern=Pattern(config.window // 2)) if config.attention == "local_global" else full
        if self.uses_flex(device):
            masks = [flex_mask(context, len(level.lengths_B), leading + n_frames, device) for context in (full, local)]
            full, local = full._replace(flex=masks[0]), local._replace(flex=masks[1])
        return level._replace(full=full, local=local)

    def uses_flex(self, device: torch.device) -> bool:
        """Returns whether FlexAttention computes the pattern; it does not support dropout."""
        config = self.stack_config
        dropout = config.attention_dropout > 0 and self.training
        return config.attention_kernel == "flex" or (
            config.attention_kernel == "auto" and device.type == "cuda" and not dropout
        )

    def chunk_pattern(self, ctx: StepContext | None) -> Pattern:
        """Draws the chunk lengths of this update, keyed by (seed, step); no limit unless attention is chunked."""
        config = self.stack_config
        if config.attention != "chunked":
            return Pattern()
        if not self.training and self.stream is not None:
            return self.stream
        chunk, left = config.chunk_frames[0], config.left_chunks[0]
        if self.training and ctx is not None:
            rng = keyed_rng(ctx.seed, ctx.step, "chunk")
            chunk, left = int(rng.choice(config.chunk_frames)), int(rng.choice(config.left_chunks))
        return Pattern(chunk=chunk, left_chunks=left) if chunk else Pattern()

    def kept_blocks(self, ctx: StepContext | None) -> list[bool]:
        """Draws layer drop, keyed by (seed, step), so that all ranks and micro-batches agree."""
        rate = self.stack_config.layer_drop
        if not self.training or ctx is None or rate == 0:
            return [True] * self.n_layers
        kept: list[bool] = (keyed_rng(ctx.seed, ctx.step, "layer_drop").random(self.n_layers) >= rate).tolist()
        return kept

    def kept_branches(self, ctx: StepContext | None, utterances: int, like: Tensor) -> Tensor | None:
        """Draws stochastic depth (Huang et al. 2016, §3): 0 or 1 / (1 − p) per residual branch and utterance.

        p grows linearly from block to block. Drawn from torch's generator, which engines seed by (seed, step,
        micro-batch), like dropout; once per pass and outside of the parts that checkpointing recomputes.
        """
        rate = self.stack_config.stochastic_depth
        if not self.training or ctx is None or rate == 0:
            return None
        rates_L11 = rate * torch.arange(1, self.n_layers + 1, device=like.device)[:, None, None] / self.n_layers
        kept_LKB = torch.rand(self.n_layers, self.branches, utterances, device=like.device) >= rates_L11
        return (kept_LKB / (1 - rates_L11)).to(like.dtype)

    def norm_last(self, output: EncoderOutput, norm: nn.Module) -> EncoderOutput:
        """Normalises the last layer (pre-norm encoders), unless the stack stopped early."""
        if self.stop_after is not None or len(output.layers) <= self.n_layers:
            return output
        return output._replace(layers=(*output.layers[:-1], norm(output.layers[-1])))


class Residual(nn.Module):
    """Applies dropout and stochastic depth at the end of a residual branch."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, y_BFD: Tensor, context: AttentionContext, branch: int) -> Tensor:
        y_BFD = self.dropout(y_BFD)
        return y_BFD if context.residual_KBF1 is None else y_BFD * context.residual_KBF1[branch]


def per_frame(factors_KB: Tensor, context: AttentionContext) -> Tensor:
    """Expands a factor per utterance to its frames and registers, (branches, B, 1 or F, 1)."""
    if not context.documents:
        return factors_KB[:, :, None, None]
    lengths = torch.tensor(context.documents, device=factors_KB.device)
    leading_KF = factors_KB.repeat_interleave(context.n_registers, dim=1)
    return torch.cat([leading_KF, factors_KB.repeat_interleave(lengths, dim=1)], dim=1)[:, None, :, None]


def over_time(x_BFD: Tensor, context: AttentionContext, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolves frames over time with zeros before, after and between utterances; registers become 0."""
    L, valid_BF, grid = context.n_leading, context.valid_BF, context.grid
    if valid_BF is not None:
        x_BFD = x_BFD.masked_fill(~valid_BF[:, :, None], 0.0)
    frames_BFD = x_BFD[:, L:]
    if grid is None:
        return nn.functional.pad(convolve(frames_BFD), (0, 0, L, 0))
    return nn.functional.pad(grid.collect(convolve(grid.spread(frames_BFD)), frames_BFD), (0, 0, L, 0))
