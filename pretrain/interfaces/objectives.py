"""Interfaces of objectives and heads, and the data that they exchange with the engine.

Shape suffixes: B batch, T audio samples, F frames, D channels.
A parameter may be used only inside `forward` of the module that owns it: ZeRO-3 gathers parameters only there.
Modules pass named tuples to each other, since ZeRO-3 finds tensors in tuples only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig, TextHeadConfig
from pretrain.interfaces.decoding import EndPoints, StreamingDecoder
from pretrain.interfaces.frames import EncoderOutput, Frames, ModelGates, StepContext
from pretrain.interfaces.models import Frontend, SpeechModel
from pretrain.interfaces.monitoring import HeadMedia, HeadMonitoringRecord, MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.subnets import Space


class Pruning(NamedTuple):
    """Gates of structured pruning.  gates: 0 where closed.  asked, found: shares of the weights."""

    gates: ModelGates
    asked: float
    """Share of the prunable weights that training was to remove."""
    found: float
    """Share of the prunable weights whose gate is closed."""


Sum = tuple[Tensor, Tensor]
"""A sum and its count; divided only after both were added over micro-batches and ranks."""


class LossOutput(NamedTuple):
    """Result of a loss. `total` is a sum over `count` targets, never a mean; metrics are (detached) sums and counts."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    metrics: Mapping[str, Sum] = {}


class MicroBatchPlan:
    """The draws of `Objective.prepare` for one micro-batch, such as masks. Objectives subclass it.

    count: number of targets, a scalar tensor. Known before the forward pass, so that the loss can be divided by the
    count of the whole global step.
    """

    count: Tensor

    @property
    def masked_BF(self) -> Tensor | None:
        """The masked frames of the encoder's output, (B, F) bool; None where an objective masks none of its frames."""
        return None


class Objective(nn.Module, abc.ABC):
    """A self-supervised loss; owns its encoder passes.

    Constructed as `Objective(config, shape)`. It is a pure function of (weights, batch, plan, ctx): the same arguments
    give the same bits, independent of earlier calls. Every micro-batch is valid input: utterances too short for a frame
    or a mask have no targets and do not change the loss of the rest of the batch.
    """

    couples: frozenset[str] = frozenset()
    """Contract tests that cannot hold by design: "padding", "batch" (the loss depends on the batch's other rows)."""
    gathers: bool = False
    """Whether `after_step` needs frames, or sums of them, that forward passes of all ranks collected in this update."""
    least_frames: int = 2
    """Fewest encoder frames with which an utterance can have a target: one masked, one visible."""
    exports_as: str = "Wav2Vec2"
    """Hugging Face's model class for this objective, unless the encoder's architecture implies another one."""
    _recording: bool = False
    _last: MicroBatchRecord | None = None

    def attach(self, model: SpeechModel) -> None:
        """Copies what an EMA teacher needs of the new model's weights; called once. Does nothing by default."""

    def least_samples(self, frontend: Frontend) -> int:
        """Returns the shortest utterance, in samples, that can have a target with this front end."""
        return frontend.least_samples(self.least_frames)

    @abc.abstractmethod
    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MicroBatchPlan:
        """Draws masks and counts targets; no gradient, no forward pass.

        Args:
            model: front end and encoder, for the number of frames of each utterance.
            batch: one micro-batch, (B, T) audio at 16 kHz, padded to at least `least_samples`.
            ctx: seed and step that key the draws.

        Returns:
            The plan for `forward`, with the number of targets.
        """

    @abc.abstractmethod
    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        """Computes the loss of one micro-batch.

        Args:
            model: front end and encoder.
            batch: the micro-batch that `plan` was prepared for.
            plan: the result of `prepare`.
            ctx: seed and step.

        Returns:
            The loss summed over its targets, and the encoder's output for the heads, (B, F, D) per layer.
        """

    def take_teacher(self, model: SpeechModel, sha256: str) -> None:
        """Receives the frozen model that `ObjectiveConfig.teacher_run` names; never part of the objective's state.

        Args:
            model: front end and encoder of the teacher.
            sha256: checksum of its weights, hexadecimal.

        Raises:
            ConfigError: it does not fit the student.
        """
        raise NotImplementedError(f"{type(self).__name__} has no teacher")

    def pruning(self) -> Pruning | None:
        """Returns the gates of structured pruning as they are after training; None for other objectives."""
        return None

    def space(self) -> Space | None:
        """Returns the subnets that a supernet trains; None for other objectives."""
        return None

    def forget(self) -> None:
        """Discards the data that forward passes collect for `after_step`. Called before each attempt at an update.

        An attempt may fail, be repeated or be skipped; `after_step` sees only the data of its own update.
        """

    def after_step(self, model: SpeechModel, ctx: StepContext) -> None:
        """Updates EMA teachers and code books; called after each optimizer update that was not skipped.

        It must give the same state on all ranks.

        Args:
            model: front end and encoder after the update.
            ctx: seed, and the number of updates before this one.
        """

    @abc.abstractmethod
    def monitoring(self) -> MonitoringRecord:
        """Returns the monitoring record; its `last` is the micro-batch recorded since `record_next`."""

    def record_next(self) -> None:
        """Makes the next forward pass keep its targets and predictions for `monitoring`."""
        self._recording, self._last = True, None

    def record(self, make: Callable[[], MicroBatchRecord]) -> None:
        """Keeps the record that `make` returns if one was requested; called by `forward`, free of cost otherwise."""
        if self._recording:
            self._recording = False
            with torch.no_grad():
                self._last = make().detached()


class HeadPlan(NamedTuple):
    """Targets of a head in one micro-batch, known before the forward pass.

    count: number of targets, a scalar tensor.  rows_B: (B,) bool, rows with at least one usable target.
    counted_BF: (B, F) bool, encoder frames with a target, for heads that learn from some frames; None: all.
    sizes_B: (B,) int64 on the host, a number of each row that decides about shapes and is computed from frame labels.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    rows_B: Tensor
    counted_BF: Tensor | None = None
    sizes_B: Tensor | None = None


class LayerMix(nn.Module):
    """Selects one layer of an encoder, or mixes several by learned weights (softmax; ELMo, arXiv 1802.05365, eq. 1).

    Args:
        layers: numbers of layers, 0 for the encoder's input; empty: the last layer.

    With one layer it has no parameter, and its output is that layer's.
    """

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = layers or (-1,)
        self.weights_L = nn.Parameter(torch.zeros(len(layers))) if len(layers) > 1 else None

    def forward(self, layers: tuple[Tensor, ...]) -> Tensor:
        """Mixes the layers of an encoder's output, (B, F, D) each, to (B, F, D)."""
        chosen = [layers[number] for number in self.layers]
        if self.weights_L is None:
            return chosen[0]
        shares = self.weights_L.softmax(0)
        return torch.stack([share * x_BFD for share, x_BFD in zip(shares, chosen, strict=True)]).sum(0)


class Head(nn.Module, abc.ABC):
    """An additional task on the encoder's output. Constructed as `Head(config, shape)`.

    It runs on every rank in every micro-batch, so that all ranks gather the same weights (ZeRO-3) and report the same
    metrics; without usable rows its loss is 0 and its gradients are 0, not None. Rows without a usable target change
    nothing. Like an objective it is a pure function of (weights, batch, plan, ctx).
    """

    couples: frozenset[str] = frozenset()
    """Contract tests that cannot hold by design: "padding", "batch" (the loss depends on the batch's other rows)."""
    gathers: bool = False
    """Whether it needs vectors of all ranks' samples, as in `Objective.gathers`."""
    starts_from_support: bool = False
    """Whether `first_weights` replaces weights of its own when it learns from an episode."""
    weight: float
    """Weight of its loss relative to the objective's, after the warm-up."""
    _recording: bool = False
    _media: HeadMedia | None = None

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.weight, self.warmup, self.input = config.weight, config.warmup, config.input
        self.signed = config.signed
        """Whether its loss may be negative."""
        self.mix = LayerMix(config.layers)

    def frames(self, encoded: EncoderOutput) -> Frames:
        """Returns the layer, or the mix of layers, that the head reads, (B, F, D)."""
        return Frames(self.mix(encoded.layers), encoded.lengths_B, encoded.rate_hz)

    def weight_at(self, step: int) -> float:
        """Returns the weight of its loss in the update after `step` updates: 0 until `warmup[0]`, then rising."""
        first, last = self.warmup
        return self.weight * (float(step >= last) if last <= first else min(max((step - first) / (last - first), 0), 1))

    @abc.abstractmethod
    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        """Finds the rows with a usable target and counts the targets; no gradient, no forward pass.

        Args:
            model: front end and encoder, for the number of frames of each utterance.
            batch: one micro-batch with its labels.
            ctx: seed and step that key the draws.
        """

    def restrict(self, plan: HeadPlan, model: SpeechModel, batch: Batch, masked_BF: Tensor | None) -> HeadPlan:
        """Returns the plan of a head that learns from masked frames alone; other heads return theirs, the default.

        Args:
            plan: the result of `prepare`.
            model: front end and encoder.
            batch: the micro-batch.
            masked_BF: (B, F) bool, the objective's masked frames; None if it masks none.

        Raises:
            ConfigError: the head needs masked frames and there are none.
        """
        return plan

    def monitoring(self) -> HeadMonitoringRecord:
        """Returns the monitoring record; by default of a head that uses every labelled row."""
        return HeadMonitoringRecord()

    def first_weights(self, encoded: EncoderOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Returns the weights, by their names in the head, with which it starts to learn from an episode's support.

        Called only where `starts_from_support`.

        Args:
            encoded: the encoder's output for the support, (B, F, D) per layer.
            batch: the support.

        Returns:
            Tensors, which may depend on other weights.
        """
        return {}

    def forget(self) -> None:
        """Discards the data that forward passes collect for `after_step`, as in `Objective.forget`."""

    def after_step(self, ctx: StepContext) -> None:
        """Updates the head's state, equally on all ranks; called after each optimizer update that was not skipped."""

    def record_next(self) -> None:
        """Makes the next forward pass with something to show keep what `take_media` returns.

        It is called on rank 0 alone: a recording pass must run the same modules as any other.
        """
        self._recording, self._media = True, None

    def take_media(self) -> HeadMedia | None:
        """Returns, once, what was kept since `record_next`, None if nothing was, and ends the recording."""
        self._recording, media, self._media = False, self._media, None
        return media

    def keep_media(self, make: Callable[[], HeadMedia | None]) -> None:
        """Keeps what `make` returns if it was requested; called by `forward`, free of cost otherwise.

        After None, for a micro-batch with nothing to show, the next forward pass is asked.
        """
        if self._recording:
            with torch.no_grad():
                media = make()
            self._media = None if media is None else media.on_host()
            self._recording = media is None

    @abc.abstractmethod
    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        """Computes the loss of one micro-batch, summed over its targets.

        Args:
            encoded: the encoder's output, (B, F, D) per layer: the objective's, or that of an unmasked pass where
                `input` is "whole".
            batch: the micro-batch that `plan` was prepared for.
            plan: the result of `prepare`.
            ctx: seed and step.

        Returns:
            Sum and count; metrics by names of the head's own, logged as `metric/HEAD/NAME`. Every micro-batch has the
            same metrics.
        """


class WritingHead(Head):
    """A head that writes text.

    Args:
        config: of the head.
        tokens: name of the token set that it writes; empty: characters.
        symbols: the characters.
    """

    def __init__(self, config: HeadConfig, tokens: str, symbols: tuple[str, ...] = ()) -> None:
        super().__init__(config)
        self.tokens = tokens
        """Name of the token set that it writes; empty: characters."""
        self.symbols = symbols
        """Text of each symbol. Empty for a head on tokens until they are named."""

    def name_tokens(self, symbols: tuple[str, ...]) -> None:
        """Sets what the tokens of the run write, in the order of their ids."""
        self.symbols = symbols

    @property
    def gives_log_probs(self) -> bool:
        """Whether it has `decoder_frames`, and they are ln p of blank and symbols, (B, F, V), for CTC's decoders."""
        return False


class TextHead(WritingHead):
    """A head that writes text frame by frame as symbols and a blank: the blank is class 0, symbol i class i + 1."""

    def __init__(self, config: TextHeadConfig) -> None:
        super().__init__(config, config.tokens, () if config.tokens else tuple(config.symbols))

    @abc.abstractmethod
    def decoder_frames(self, encoded: EncoderOutput) -> Tensor:
        """Returns the frames that its decoder reads, (B, F, …)."""

    @abc.abstractmethod
    def streaming_decoder(self, rate_hz: float, beam: int, end_points: EndPoints) -> StreamingDecoder[Any]:
        """Returns the decoder of its frames, which also decodes whole recordings.

        Args:
            rate_hz: frames per second.
            beam: prefixes that the search keeps; 0: greedy.
            end_points: when segments end.
        """
