"""Interfaces of the parts of a speech model: front end, encoder, and their composition."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import BlockGates, EncoderOutput, Frames, StepContext, valid_frames


def shortest_input(lengths_of: Callable[[Tensor], Tensor], frames: int = 1) -> int:
    """Returns the fewest samples that give at least `frames` frames.

    Args:
        lengths_of: samples to frames, int64 (B,) to (B,); must not decrease with the length of the audio.
        frames: number of frames.
    """
    shortest, enough = 0, 1
    while int(lengths_of(torch.tensor([enough], device="cpu"))) < frames:
        shortest, enough = enough, 2 * enough
    while enough - shortest > 1:
        middle = (shortest + enough) // 2
        if int(lengths_of(torch.tensor([middle], device="cpu"))) < frames:
            shortest = middle
        else:
            enough = middle
    return enough


class ChannelGroup(NamedTuple):
    """Channels between two layers of a front end, which can be removed.  size: their number.

    rows, columns: names of the front end's parameters with these channels as their first, or as their second axis.
    """

    size: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]


class Frontend(nn.Module, abc.ABC):
    """Converts a waveform to frames in two stages: `extract` returns features, `project` the encoder's input.

    Constructed as `Frontend(config, dim)`, where `dim` is the number of channels of the encoder's input.
    """

    couples: frozenset[str] = frozenset()
    """Contract tests that cannot hold by design with this config: "padding", "batch"."""
    packed: bool = False
    """Run convolutions on utterances packed end to end, without padding; inputs and outputs are the same."""
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float

    def watched(self) -> dict[str, Tensor]:
        """Returns scalars of the last forward pass to log, by name. Default: none."""
        return {}

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """Returns the channels that structured pruning may remove, in the order of `gates`. Default: none."""
        return ()

    def narrowed(self, sizes: Sequence[int]) -> dict[str, object]:
        """Returns the fields of the config that give these numbers of channels to `channel_groups`."""
        return {}

    @abc.abstractmethod
    def extract(self, wave_BT: Tensor, lengths_B: Tensor, gates: tuple[Tensor, ...] = ()) -> Frames:
        """Computes the features of audio.

        Args:
            wave_BT: (B, T) samples in [-1, 1] at 16 kHz, zero beyond each length; T is at least `least_samples()`.
            lengths_B: valid samples of each row, int64; may be too short for a single frame.
            gates: (C,) factors of the channels of each of `channel_groups` where they are read; a channel with a factor
                of 0 counts in no norm either, so that it can be removed. Empty: all are 1.

        Returns:
            (B, F', feature_dim) at `feature_rate_hz`, zero beyond each length.
        """

    @abc.abstractmethod
    def project(self, features: Frames, gates: tuple[Tensor, ...] = ()) -> Frames:
        """Converts (B, F', feature_dim) features to (B, F, dim) frames at `rate_hz`, zero beyond each length.

        Args:
            features: from `extract`.
            gates: those given to `extract`.
        """

    @abc.abstractmethod
    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of valid feature frames for each number of samples, (B,)."""

    @abc.abstractmethod
    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of valid encoder frames for each number of samples, (B,); does not decrease with it."""

    def least_samples(self, frames: int = 1) -> int:
        """Returns the shortest audio, in samples, that gives at least `frames` encoder frames."""
        return shortest_input(self.frame_lengths, frames)


class Embedding(nn.Module, abc.ABC):
    """Converts a text or an image of each sample to frames for an encoder. Constructed as `Embedding(config, dim)`.

    Frames of samples without one are finite and have no meaning; `present` returns which samples have one. Results per
    sample are on the host.
    """

    dim: int
    """Channels of its frames."""

    @abc.abstractmethod
    def present(self, batch: Batch) -> Tensor:
        """Returns which samples have what it embeds, (B,) bool."""

    def given(self, batch: Batch) -> Tensor:
        """Returns which samples have one that is usable or not, such as a text that is too long, (B,) bool."""
        return self.present(batch)

    @abc.abstractmethod
    def identity(self, batch: Batch) -> Tensor:
        """Returns a number for each sample, (B,) int64, equal for equal inputs; 0 for samples without one."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Frames:
        """Returns (B, F, dim) frames with F of at least 1; of `lengths_B`, those of absent samples are 0."""


class Encoder(nn.Module, abc.ABC):
    """Computes the outputs of all layers from frames. Constructed as `Encoder(config)`."""

    couples: frozenset[str] = frozenset()
    dim: int
    n_layers: int
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute each block, or only its cheap operations, in the backward pass, with the same dropout."""
    packed: bool = False
    """Compute on utterances packed end to end in one row, without padding; inputs and outputs are (B, F, D)."""
    keep_ffn: bool = False
    """Fill `EncoderOutput.ffn_layers`."""
    stop_after: int | None = None
    """Number of blocks to run; the output then ends with that layer. None: all."""

    def add_prompts(self, count: int) -> None:
        """Gives each block `count` learned frames that its frames attend to.

        Raises:
            ValueError: the encoder has no place for them, the default.
        """
        raise ValueError(f"tune.name=prompt: {type(self).__name__} has no place for prompts; take lora, bias or head")

    def take_prompts(self) -> Tensor | None:
        """Removes the frames of `add_prompts` and returns them, (L, P, D), without a gradient; None: it has none."""
        return None

    def feed_forward_outputs(self) -> list[str]:
        """Returns the names of the linear layers that end the last feed-forward part of each block; default: none."""
        return []

    @abc.abstractmethod
    def forward(
        self,
        frames: Frames,
        ctx: StepContext | None = None,
        gates: tuple[BlockGates, ...] = (),
        prompts_BLPD: Tensor | None = None,
    ) -> EncoderOutput:
        """Encodes frames.

        Args:
            frames: (B, F, dim); the first `lengths_B` frames of each row are valid (0 is allowed).
            ctx: seed and step that key layer drop in training; None disables it.
            gates: factors of heads and inner channels of each block (pruning, supernets); empty: all are 1. With fewer
                gates than blocks, the first blocks alone run.
            prompts_BLPD: P learned frames for each row and block; None: those of `add_prompts`, if any, in all rows.
                Encoders that have no place for prompts ignore it.

        Returns:
            Outputs of all layers, (B, F, dim) each.
        """


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and rates of a model that objectives and heads are built for."""

    dim: int
    n_layers: int
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float


class SpeechModel(nn.Module):
    """Front end and encoder, the part that is used after pretraining.

    Objectives must call `extract` and `project` of this class instead of the front end's: the outputs pass through two
    identity modules, `features` and `frames`, for the forward hooks of monitoring.
    """

    def __init__(self, frontend: Frontend, encoder: Encoder) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.features, self.frames = nn.Identity(), nn.Identity()

    @property
    def shape(self) -> ModelShape:
        """Sizes and rates that objectives and heads are built for."""
        f, e = self.frontend, self.encoder
        return ModelShape(e.dim, e.n_layers, f.feature_dim, f.feature_rate_hz, f.rate_hz)

    def extract(self, wave_BT: Tensor, lengths_B: Tensor, gates: tuple[Tensor, ...] = ()) -> Frames:
        """Computes the front end's features, which `project` reads.

        Args:
            wave_BT: (B, T) samples in [-1, 1] at 16 kHz, zero beyond each length.
            lengths_B: valid samples of each row, int64.
            gates: factors of the front end's channels (pruning); empty: all are 1.

        Returns:
            (B, F', feature_dim) at `feature_rate_hz`, zero beyond each length.
        """
        features: Frames = self.features(self.frontend.extract(wave_BT, lengths_B, gates))
        return features

    def project(self, features: Frames, gates: tuple[Tensor, ...] = ()) -> Frames:
        """Returns the encoder's input frames, (B, F, dim).

        Args:
            features: from `extract`.
            gates: those given to `extract`.
        """
        frames: Frames = self.frames(self.frontend.project(features, gates))
        return frames

    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> EncoderOutput:
        """Encodes audio without a mask, as after pretraining.

        Args:
            wave_BT: (B, T) samples in [-1, 1] at 16 kHz, zero beyond each length.
            lengths_B: valid samples of each row, int64.

        Returns:
            Outputs of all layers, (B, F, dim) each.
        """
        out: EncoderOutput = self.encoder(self.project(self.extract(wave_BT, lengths_B)))
        return out


class Memory(NamedTuple):
    """Frames that a decoder attends to: x_BMD (B, M, D), of which the first lengths_B of each row are valid."""

    x_BMD: Tensor
    lengths_B: Tensor

    def valid_BM(self) -> Tensor:
        """Returns (B, M) bool, False for padding."""
        return valid_frames(self.lengths_B, self.x_BMD.shape[1], self.x_BMD.device)


class DecoderState(NamedTuple):
    """State of a decoder between the tokens of a text.

    place: tokens read.  past, memory: keys and values (B, H, N or M, C) of each block, of tokens and of memories.
    visible_BM: bool, frames of the memories that may be attended to; None: all.
    """

    place: int
    past: tuple[tuple[Tensor, Tensor], ...]
    memory: tuple[tuple[Tensor, Tensor], ...]
    visible_BM: Tensor | None

    def select(self, rows: Tensor, memory: bool = True) -> DecoderState:
        """Returns the state of these rows, (R,) int64; with `memory=False` the memories, one for all rows, stay."""
        past = tuple((key[rows], value[rows]) for key, value in self.past)
        if not memory:
            return self._replace(past=past)
        kept = tuple((key[rows], value[rows]) for key, value in self.memory)
        visible_BM = None if self.visible_BM is None else self.visible_BM[rows]
        return self._replace(past=past, memory=kept, visible_BM=visible_BM)


class Decoder(nn.Module, abc.ABC):
    """Predicts each token of a text from those before it and from memories."""

    max_tokens: int
    """Longest text that it can read."""

    @abc.abstractmethod
    def forward(self, tokens_BN: Tensor, memories: Sequence[Memory]) -> Tensor:
        """Predicts all tokens of texts at once.

        Args:
            tokens_BN: (B, N) int64, tokens from the start mark on.
            memories: always the same number, in the same order.

        Returns:
            (B, N, V) logits of the token that follows each position, which depend on no later one.
        """

    @abc.abstractmethod
    def start(self, memories: Sequence[Memory]) -> DecoderState:
        """Returns the state before the start mark."""

    @abc.abstractmethod
    def step(self, state: DecoderState, tokens_B: Tensor) -> tuple[Tensor, DecoderState]:
        """Reads one token of each row, (B,) int64; returns the logits (B, V) of the next one and the state after it."""


class Joiner(Protocol):
    """Predicts the next class of a transducer from a frame and the last tokens. The blank is class 0."""

    @property
    def context(self) -> int:
        """Number of last tokens that it reads; the blank takes the place of those before the first one."""

    def predict(self, classes_NC: Tensor) -> Tensor:
        """Returns what `join` reads of the classes of the last tokens, int64 (…, C), as (…, J)."""

    def join(self, frame_NJ: Tensor, token_NJ: Tensor) -> Tensor:
        """Returns logits of the next class, (…, V), of frames and of last tokens, (…, J) each."""
