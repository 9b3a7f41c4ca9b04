"""Base class of encoders of equal blocks that also compute a stream chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.interfaces.streaming import BlockMemory, EncoderState, Obstacle, StreamingEncoder
from pretrain.nn.attention_patterns import AttentionContext
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.half_rate import repeated
from pretrain.nn.numerics import zero_padding
from pretrain.nn.positions import rotary_angles


class StreamingStack(BlockStack, StreamingEncoder):
    """Base class of encoders of equal blocks that can stream.

    Its blocks have a method `step(x_BFD, BlockMemory, AttentionContext) -> (x_BFD, BlockMemory)` beside `forward`;
    subclasses implement `encode` and `step`.
    """

    tail: int = 0
    """Frames that the convolution inside a block needs from the chunks before."""

    def obstacles(self) -> list[Obstacle]:
        config, found = self.stack_config, []
        if config.attention != "chunked":
            reason = "frames attend to later ones without limit; train with encoder.attention=chunked"
            if config.attention == "local_global":
                reason = "windows are symmetric, and registers see everything; train with encoder.attention=chunked"
            found.append(Obstacle("encoder.attention", config.attention, reason))
        elif not self.trained_chunks()[0]:
            reason = "no chunk length was trained; train with lengths such as [0, 8, 16, 32]"
            found.append(Obstacle("encoder.chunk_frames", list(config.chunk_frames), reason))
        if self.prompts_LPD is not None:
            found.append(Obstacle("tune.name", "prompt", "a stream has no place for prompts; take tune=lora"))
        return found

    def trained_chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(chunk for chunk in self.stack_config.chunk_frames if chunk), self.stack_config.left_chunks

    def start(self, rows: int, chunk: int, left_chunks: int) -> EncoderState:
        like, widths = next(self.parameters()), self.stack_config.block_widths

        def memory(number: int) -> BlockMemory:
            kept = (
                max(0, left_chunks) * chunk // (2 if self.half_rate is not None and number in self.at_half_rate else 1)
            )
            keys_BHLC = like.new_zeros(rows, widths[number].heads, kept, self.head_dim)
            return BlockMemory(keys_BHLC, keys_BHLC.clone(), like.new_zeros(rows, self.tail, self.dim))

        frames_B = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return EncoderState(tuple(map(memory, range(self.n_layers))), frames_B)

    def step_blocks(
        self, x_BFD: Tensor, frames: Frames, state: EncoderState, left_chunks: int
    ) -> tuple[EncoderOutput, EncoderState]:
        """Runs all blocks on the next chunk of each stream.

        Args:
            x_BFD: input of the first block, (B, chunk, D).
            frames: lengths and frame rate of the chunk.
            state: from `start` or the previous chunk.
            left_chunks: chunks that memories keep; -1: all.

        Returns:
            All layers, the last one not normalised, and the state after the chunk.
        """
        memories, middle = list(state.blocks), self.at_half_rate
        fine_BFD, layers = x_BFD, [x_BFD]
        context = self.stream_context(x_BFD, frames.lengths_B, state.frames_B, memories[0], left_chunks)
        coarse = context
        for number in range(self.n_layers):
            if self.half_rate is not None and number == middle.start:
                fine_BFD, x_BFD = x_BFD, self.half_rate.down(zero_padding(x_BFD, frames.lengths_B), None)
                lengths_B = (frames.lengths_B + 1) // 2
                coarse = self.stream_context(x_BFD, lengths_B, state.frames_B // 2, memories[number], left_chunks)
            inner = self.half_rate is not None and number in middle
            block: Any = self.blocks[number]
            x_BFD, memories[number] = block.step(x_BFD, memories[number], coarse if inner else context)
            if self.half_rate is not None and number + 1 == middle.stop:
                x_BFD, inner = self.half_rate.up(x_BFD, fine_BFD, None), False
            layers.append(repeated(x_BFD, fine_BFD, None) if inner else x_BFD)
        output = EncoderOutput(tuple(layers), frames.lengths_B, frames.rate_hz)
        return output, EncoderState(tuple(memories), state.frames_B + frames.lengths_B)

    def stream_context(
        self, x_BFD: Tensor, lengths_B: Tensor, frames_B: Tensor, memory: BlockMemory, left_chunks: int
    ) -> AttentionContext:
        """Returns the attention context of a chunk: which frames of memory and chunk each stream has, and rotations.

        Args:
            x_BFD: the chunk, (B, F, D).
            lengths_B: valid frames of the chunk.
            frames_B: frames of each stream before it.
            memory: of a block at this frame rate.
            left_chunks: chunks that memories keep; -1: all.
        """
        kept, device = memory.keys_BHLC.shape[2], x_BFD.device
        at_F, at_L = torch.arange(x_BFD.shape[1], device=device), torch.arange(kept, device=device)
        valid_BF = at_F < lengths_B.clamp(min=1)[:, None]  # an empty softmax is not finite
        visible_BK = torch.cat([at_L >= kept - frames_B[:, None], valid_BF], dim=1)
        everything = not torch.compiler.is_exporting() and bool(visible_BK.all())
        rotary = rotary_angles(frames_B[:, None] + at_F, self.head_dim) if self.rotary else None
        return AttentionContext(
            None if everything else valid_BF,
            rotary=rotary,
            visible_BK=None if everything else visible_BK,
            left_chunks=left_chunks,
        )
