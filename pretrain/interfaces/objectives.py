"""What flows through a model, and the contracts of its parts.

Shape suffixes: B batch, T audio samples, F frames, D channels.
A parameter is used only inside `forward` of the module that owns it: ZeRO-3 gathers parameters there and nowhere else.
What modules pass to each other are named tuples, since ZeRO-3 looks for tensors in tuples only.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch

Sum = tuple[Tensor, Tensor]
"""A sum and the count to divide it by, once, after both were added over micro-batches and ranks."""


class Frames(NamedTuple):
    """x_BFD: features; lengths_B: valid frames of each row, int64; rate_hz: frames per second.

    raw_BFD: the same before a learned last normalisation, where there is one; feature penalties act on it.
    """

    x_BFD: Tensor
    lengths_B: Tensor
    rate_hz: float
    raw_BFD: Tensor | None = None
    places_BF: Tensor | None = None
    """Index in time of each frame, where some were taken out; padding repeats the last. None: 0, 1, 2 …"""

    def valid_BF(self) -> Tensor:
        """True where a frame is speech and not padding."""
        return torch.arange(self.x_BFD.shape[1], device=self.lengths_B.device)[None] < self.lengths_B[:, None]


class EncoderOutput(NamedTuple):
    """layers: what entered the first block, then the output of each block (normed at the last), all (B, F, D).

    ffn_layers: the last feed-forward part of each block before its residual sum, if the encoder's `keep_ffn` is on.
    """

    layers: tuple[Tensor, ...]
    lengths_B: Tensor
    rate_hz: float
    ffn_layers: tuple[Tensor, ...] = ()

    @property
    def final(self) -> Frames:
        """The last layer."""
        return Frames(self.layers[-1], self.lengths_B, self.rate_hz)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What random draws are keyed by. Masks use (seed, step, key); layer drop (seed, step), alike on all ranks."""

    seed: int
    step: int
    """Optimizer steps done before this one."""


class LossOutput(NamedTuple):
    """`total` is a sum over `count` targets, never a mean; metrics are sums and counts, too (detached)."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    metrics: Mapping[str, Sum] = {}


class Plan:
    """What `Objective.prepare` decided for one micro-batch (masks and the like). Objectives subclass it.

    count: number of targets, a scalar tensor. Known before the forward pass, so that the loss can be divided by the
    count of the whole global step.
    """

    count: Tensor


class Frontend(nn.Module, abc.ABC):
    """Waveform to frames in two stages: `extract` gives features, `project` brings them to the encoder."""

    couples: frozenset[str] = frozenset()
    """Contract checks that cannot hold by design with this config: "padding", "batch"."""
    packed: bool = False
    """Run convolutions on utterances end to end, without padding; what comes in and goes out stays the same."""
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float

    def watched(self) -> dict[str, Tensor]:
        """Scalars of the last forward pass that are worth a curve, by name. Default: none."""
        return {}

    @abc.abstractmethod
    def extract(self, wave_BT: Tensor, lengths_B: Tensor) -> Frames:
        """(B, T) audio to (B, F', feature_dim) at feature_rate_hz; zero beyond each length."""

    @abc.abstractmethod
    def project(self, features: Frames) -> Frames:
        """(B, F', feature_dim) to (B, F, dim) at rate_hz; zero beyond each length."""

    @abc.abstractmethod
    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Samples to valid feature frames."""

    @abc.abstractmethod
    def frame_lengths(self, lengths_B: Tensor) -> Tensor:
        """Samples to valid encoder frames."""


class Encoder(nn.Module, abc.ABC):
    """Frames in, all layers out."""

    couples: frozenset[str] = frozenset()
    dim: int
    n_layers: int
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute each block, or only its cheap parts, in the backward pass; dropout draws the same again."""
    packed: bool = False
    """Compute on utterances end to end in one row, without padding; what comes in and goes out stays (B, F, D)."""
    keep_ffn: bool = False
    """Fill `EncoderOutput.ffn_layers`."""
    stop_after: int | None = None
    """Run only so many blocks; the output then ends with that layer."""

    @abc.abstractmethod
    def forward(self, frames: Frames, ctx: StepContext | None = None) -> EncoderOutput:
        """`ctx` keys layer drop in training; None draws nothing."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an objective or head must know of the model before it exists."""

    dim: int
    n_layers: int
    feature_dim: int
    feature_rate_hz: float
    rate_hz: float


class SpeechModel(nn.Module):
    """frontend + encoder: what pretraining leaves behind."""

    def __init__(self, frontend: Frontend, encoder: Encoder) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder

    @property
    def shape(self) -> ModelShape:
        f, e = self.frontend, self.encoder
        return ModelShape(e.dim, e.n_layers, f.feature_dim, f.feature_rate_hz, f.rate_hz)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> EncoderOutput:
        """Unmasked encoding, as used after pretraining."""
        out: EncoderOutput = self.encoder(self.frontend.project(self.frontend.extract(wave_BT, lengths_B)))
        return out


class Objective(nn.Module, abc.ABC):
    """A self-supervised loss; owns its encoder passes.

    Construct-time contract: `Objective(config, shape)`. It must be pure in (weights, batch, plan, ctx): the same
    context gives the same bits, whatever ran before.
    """

    couples: frozenset[str] = frozenset()
    targets_stand: bool = False
    """Whether its targets are there before the first update, and so can be judged at it."""
    exports_as: str = "Wav2Vec2"
    """Hugging Face's name for a model trained so, where the encoder is of no kind that has its own."""

    def attach(self, model: SpeechModel) -> None:
        """Runs once, when the model exists: an EMA teacher copies what it needs. Default: nothing."""

    @abc.abstractmethod
    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> Plan:
        """Draws masks and counts targets; no gradient, no forward pass."""

    @abc.abstractmethod
    def forward(
        self, model: SpeechModel, batch: Batch, plan: Plan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """The loss summed over its targets, and the encoder's output for the heads."""

    def forget(self) -> None:
        """Throws away what forward passes collect for `after_step`. Runs before each attempt at an update.

        An attempt may fail, be computed again or be left out; `after_step` sees those of its own update alone.
        """

    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Runs after an update of the optimizer that was not left out (EMA teachers, code books)."""


class Head(nn.Module, abc.ABC):
    """A further task on the encoder's output. Construct-time contract: `Head(config, shape)`."""

    weight: float

    @abc.abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Number of targets of this batch, a scalar tensor."""

    @abc.abstractmethod
    def forward(self, encoded: EncoderOutput, batch: Batch) -> LossOutput:
        """The loss summed over its targets."""
