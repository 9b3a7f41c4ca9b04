"""Interfaces of front ends and encoders that compute a stream chunk by chunk, and their state.

Each call takes a state and returns a new one; modules keep nothing between two calls. All tensors of a state have one
row per stream, and the streams of a batch may be at different positions. The result equals that of the same model over
the whole recording with the attention pattern `Pattern(chunk, left_chunks)`.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

from torch import Tensor

from pretrain.interfaces.frames import EncoderOutput, Frames


class Obstacle(NamedTuple):
    """A field of the config that makes streaming impossible, its value, and the reason with the remedy."""

    field: str
    value: object
    reason: str


class SampleWindow(NamedTuple):
    """Samples that encoder frame f depends on: hop · f − before … hop · f + after (exclusive); after ≥ hop."""

    hop: int
    before: int
    after: int

    def samples(self, frames: int) -> int:
        """Returns the number of samples that `frames` adjacent frames depend on."""
        return (frames - 1) * self.hop + self.before + self.after


FrontendState = tuple[Tensor, ...]
"""State of a front end between chunks; each tensor is (B, …)."""


class BlockMemory(NamedTuple):
    """State of a block between chunks, right-aligned: a stream's newest frames are the last ones.

    keys_BHLC, values_BHLC: of the L frames before the next chunk, rotated, (B, heads, L, C).
    tail_BKD: input of the block's convolution in the K frames before the next chunk; K may be 0.
    """

    keys_BHLC: Tensor
    values_BHLC: Tensor
    tail_BKD: Tensor


class EncoderState(NamedTuple):
    """State of an encoder between chunks.  frames_B: frames that each stream has encoded, int64."""

    blocks: tuple[BlockMemory, ...]
    frames_B: Tensor


class StreamingFrontend(abc.ABC):
    """A front end that can compute frames from a window of samples and a state."""

    @abc.abstractmethod
    def obstacles(self) -> list[Obstacle]:
        """Returns the fields of its config that forbid streaming; empty if it can stream."""

    @abc.abstractmethod
    def sample_window(self) -> SampleWindow:
        """Returns the samples that a frame depends on, beside the state."""

    @abc.abstractmethod
    def start(self, rows: int) -> FrontendState:
        """Returns the state of `rows` streams before their first sample."""

    @abc.abstractmethod
    def step(
        self, wave_BT: Tensor, samples_B: Tensor, frames_B: Tensor, state: FrontendState
    ) -> tuple[Frames, FrontendState]:
        """Computes the next frames of each stream.

        Args:
            wave_BT: (B, T) samples that begin `before` samples ahead of the next frame, with
                T = `SampleWindow.samples(n)` for n frames; zero before the stream's start and after its end.
            samples_B: samples of each row up to the stream's end, counted from the row's start, at most T; int64.
            frames_B: frames that each stream had before, int64.
            state: from `start` or the previous step.

        Returns:
            (B, n, dim) frames, of which `lengths_B` are valid, and the new state.
        """


class StreamingEncoder(abc.ABC):
    """An encoder that can compute one chunk of frames from a state."""

    @abc.abstractmethod
    def obstacles(self) -> list[Obstacle]:
        """Returns the fields of its config that forbid streaming; empty if it can stream."""

    @abc.abstractmethod
    def trained_chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the chunk lengths in frames and the left contexts in chunks (-1: all) that it was trained with."""

    @abc.abstractmethod
    def start(self, rows: int, chunk: int, left_chunks: int) -> EncoderState:
        """Returns the state of `rows` streams before their first frame.

        Args:
            rows: streams.
            chunk: frames per chunk.
            left_chunks: earlier chunks attended to; -1: all, for which the state grows with the stream.
        """

    @abc.abstractmethod
    def step(self, frames: Frames, state: EncoderState, left_chunks: int) -> tuple[EncoderOutput, EncoderState]:
        """Encodes the next chunk of each stream.

        Args:
            frames: (B, chunk, D); fewer valid ones than `chunk` only in a stream's last chunk.
            state: from `start` or the previous step.
            left_chunks: as given to `start`.

        Returns:
            All layers, (B, chunk, D), and the new state.
        """
