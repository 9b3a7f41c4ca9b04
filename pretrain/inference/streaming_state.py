"""State of streams of audio as named tuples; joins and separates the states of several streams.

A state has one row per stream. Joined states compute in one batch, whatever the position of each stream, with the same
result for each row as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.interfaces.streaming import BlockMemory, EncoderState, FrontendState


class StreamState(NamedTuple):
    """State of B streams.

    frontend, encoder: states of the parts of the model, with B rows.
    pending: per stream, the samples that the next chunk starts with, (T_b,), on the host.
    samples: samples received, per stream.
    frames: frames encoded, per stream.
    """

    frontend: FrontendState
    encoder: EncoderState
    pending: tuple[Tensor, ...]
    samples: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of streams."""
        return len(self.pending)

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        memories = [tensor for memory in self.encoder.blocks for tensor in memory]
        tensors = [*self.frontend, *memories, self.encoder.frames_B, *self.pending]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def take(state: StreamState, rows: Sequence[int]) -> StreamState:
    """Returns the state of some of the streams, in this order."""
    if list(rows) == list(range(state.rows)):
        return state
    index = torch.tensor(list(rows), dtype=torch.int64, device=state.encoder.frames_B.device)
    blocks = tuple(BlockMemory(*(tensor[index] for tensor in memory)) for memory in state.encoder.blocks)
    return StreamState(
        tuple(tensor[index] for tensor in state.frontend),
        EncoderState(blocks, state.encoder.frames_B[index]),
        tuple(state.pending[row] for row in rows),
        tuple(state.samples[row] for row in rows),
        tuple(state.frames[row] for row in rows),
    )


def split(state: StreamState) -> list[StreamState]:
    """Returns the state of each stream alone."""
    return [take(state, [row]) for row in range(state.rows)]


def join(states: Sequence[StreamState]) -> StreamState:
    """Returns one state with the streams of all, in order. All must come from the same model, chunk and left context.

    Memories of different length (all frames are kept, `left_chunks=-1`) are padded on the left: the newest frames of a
    stream are the last ones, and `EncoderState.frames_B` is their number.
    """
    if len(states) == 1:
        return states[0]
    blocks = tuple(
        _joined_memories([state.encoder.blocks[number] for state in states])
        for number in range(len(states[0].encoder.blocks))
    )
    return StreamState(
        tuple(torch.cat(parts) for parts in zip(*(state.frontend for state in states), strict=True)),
        EncoderState(blocks, torch.cat([state.encoder.frames_B for state in states])),
        sum((state.pending for state in states), ()),
        sum((state.samples for state in states), ()),
        sum((state.frames for state in states), ()),
    )


def _joined_memories(memories: Sequence[BlockMemory]) -> BlockMemory:
    longest = max(memory.keys_BHLC.shape[2] for memory in memories)

    def aligned(x_BHLC: Tensor) -> Tensor:
        missing = longest - x_BHLC.shape[2]
        return F.pad(x_BHLC, (0, 0, missing, 0)) if missing else x_BHLC

    return BlockMemory(
        torch.cat([aligned(memory.keys_BHLC) for memory in memories]),
        torch.cat([aligned(memory.values_BHLC) for memory in memories]),
        torch.cat([memory.tail_BKD for memory in memories]),
    )
