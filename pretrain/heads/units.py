"""Text to acoustic units and units to text, by a tower of what is read and a decoder with cross-modal attention.

As in VALL-E (arXiv 2301.02111), a decoder writes the first level of units one by one, given a text and a short prompt
of the voice, and further levels take one pass each. The tower reads in both directions and has BERT's loss
(arXiv 1810.04805, § 3.1). With `direction: units_to_text` the same parts recognise (SpeechT5, arXiv 2110.07205).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from pretrain import registry
from pretrain.interfaces.configs import EncoderConfig, FrameLabels, HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import Memory, ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.models.decoders.transformer import DecoderConfig, OnePassDecoder, TransformerDecoder
from pretrain.models.synthesis.unit_audio import UnitAudio, UnitAudioConfig
from pretrain.models.synthesis.unit_parts import Durations, Tower
from pretrain.models.synthesis.waveform_loss import own_speech
from pretrain.nn.numerics import full_precision
from pretrain.nn.unit_runs import Runs, begins, frames_of_runs, runs_of


@config
class Config(HeadConfig):
    name: Literal["units"] = "units"
    direction: Annotated[Literal["text_to_units", "units_to_text"], about("what is read, and what is written")] = (
        "text_to_units"
    )
    tokens: Annotated[str, about("name in data.tokens of the text's tokens", min_length=1)] = "text"
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=1)]
    levels: Annotated[
        tuple[str, ...],
        about("names in data.targets of the units; several: code levels, the first one written one by one"),
    ] = ("units",)
    units: Annotated[int, about("number of different units of each level", ge=2)] = 100
    label_rate_hz: Annotated[float, about("frames per second of the units", gt=0)] = 50.0
    same: Annotated[
        str, about("label that the segment of a prompt shares with the one to speak; empty: it is any other segment")
    ] = "speaker"
    prompt_seconds: Annotated[float, about("longest prompt", gt=0)] = 3.0
    prompt_drop: Annotated[float, about("share of the segments without a prompt in training", ge=0, lt=1)] = 0.1
    masked_weight: Annotated[float, about("weight of BERT's loss of the tower", ge=0)] = 0.1
    label_smoothing: Annotated[float, about("share of the target's probability spread over all", ge=0, lt=1)] = 0.1
    max_read: Annotated[int, about("longest text, or sequence of units, that is read", ge=1, le=65_536)] = 1_000
    tower: Annotated[EncoderConfig, registry.choice("encoders")]
    decoder: Annotated[DecoderConfig, about("sizes of the decoder")] = dataclasses.field(default_factory=DecoderConfig)
    audio: Annotated[
        UnitAudioConfig | None, about("sizes of what makes audio of units, for `auricle speak`; null: units alone")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or len(set(self.levels)) < len(self.levels):
            refuse("levels", list(self.levels), "must be one or more different names")
        if len(self.levels) > 1 and not self.speaks:
            refuse("levels", list(self.levels), "recognition reads one level; name the first one alone")
        if self.audio is not None and not self.speaks:
            refuse("audio", "{…}", "a head that writes text makes no audio; leave it out")

    @property
    def speaks(self) -> bool:
        """Whether units are written."""
        return self.direction == "text_to_units"

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token set of the text."""
        return {self.tokens: self.vocabulary}

    @property
    def lines_of(self) -> str:
        """The token set of the text, where text is read: BERT's loss needs no audio."""
        return self.tokens if self.speaks and self.masked_weight else ""

    @property
    def frame_labels(self) -> tuple[FrameLabels, ...]:
        """The units."""
        return tuple(
            FrameLabels(name, self.label_rate_hz, self.units, "levels", "label_rate_hz") for name in self.levels
        )


SHARE_MASKED = 0.15
"""Share of the tower's tokens that BERT's loss predicts; 80 % of these are hidden, 10 % replaced, 10 % unchanged."""


LONGEST = 6.0
"""Largest ln(1 + frames) of a unit, against a duration that was predicted wrongly."""


class Written(NamedTuple):
    """What the decoder attends to, and the predicted number of what it writes, as ln(1 + number), (B,)."""

    memories: tuple[Memory, Memory]
    log_length_B: Tensor


class Sources(NamedTuple):
    """What is read and what is to be written, ids padded with -1, on the device of the weights; lengths on the host.

    levels: frame labels of each level, (B, F).
    """

    read_BN: Tensor
    read_B: Tensor
    written_BN: Tensor
    written_B: Tensor
    runs: Runs
    levels: tuple[Tensor, ...]


class Units(Head):
    """Writes units of a text, or the text of units. Ids are 0 … n − 1, then the end and the start mark.

    Loss per row, times the written ids with the end mark: their mean cross-entropy, that of frames at each further
    level, squared errors of ln(1 + frames) of units and of ln(1 + written ids), BERT's loss of the tower, and, with
    `audio`, L1 of mel frames and the spectral distance of audio, both from units. Equal neighbours among units are
    one. A prompt is cut from another segment of the micro-batch, never from the one to speak, which could be copied. A
    row without text or units, or with too many of either, does not count. Where text is read and `data.lines` is set,
    the loss of each row that counts has BERT's loss of a line as well, which is another text than the row's.
    """

    couples = frozenset({"batch"})

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        dim = config.decoder.dim or shape.dim
        reads, writes = config.vocabulary, config.units
        if not config.speaks:
            reads, writes = writes, reads
        self.reads, self.end, self.start = reads, writes, writes + 1
        self.tower = Tower(registry.build_encoder(config.tower), config.tower.dim, reads)
        self.from_tower, self.from_prompt = nn.Linear(config.tower.dim, dim), nn.Linear(shape.dim, dim)
        self.length = nn.Linear(config.tower.dim, 1)
        self.decoder = TransformerDecoder(config.decoder, dim=dim, tokens=writes + 2, classes=writes + 1, memories=2)
        self.durations = Durations(config.units, dim) if config.speaks else None
        frame_level = dataclasses.replace(config.decoder, positions="sinusoidal")
        self.refiners = nn.ModuleList(
            OnePassDecoder(frame_level, dim=dim, tokens=level * config.units, classes=config.units, memories=2)
            for level in range(1, len(config.levels))
        )
        self.audio = None
        if config.audio is not None:
            self.audio = UnitAudio(
                config.audio,
                levels=len(config.levels),
                units=config.units,
                rate_hz=config.label_rate_hz,
                prompt_dim=shape.dim,
            )

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        units_B = begins(self._levels(batch)[0]).sum(1).cpu()
        read_B, written_B = self._counts(batch, units_B)
        rows_B = (read_B > 0) & (read_B <= self.config.max_read)
        rows_B &= (written_B > 0) & (written_B < self.decoder.max_tokens)
        rows_B &= model.frontend.frame_lengths(batch.lengths_B) > 0
        return HeadPlan(((written_B + 1) * rows_B).sum().double(), rows_B, sizes_B=units_B)

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        found = self._sources(batch, plan)
        device = found.read_BN.device
        rngs = [keyed_rng(ctx.seed, ctx.step, key, "units") for key in batch.keys]
        prompt = self._prompt(encoded, batch, plan, rngs)
        given = self.read(found.read_BN, found.read_B, prompt, ctx)
        scores, counted_BN = self._decoded(given, found)
        masked_B = self._masked(found.read_BN, found.read_B, rngs, ctx)
        losses = {"tokens": scores.loss_B, "masked": self.config.masked_weight * masked_B}
        losses |= self._of_lines(batch, ctx)
        with full_precision(device):
            losses["length"] = (given.log_length_B - found.written_B.to(device).float().log1p()).square()
            losses |= self._of_units(given, found)
        losses |= self._of_audio(prompt, found, batch, plan, ctx)
        rows_B = plan.rows_B.to(device)
        weights_B = (found.written_B.to(device) + 1) * rows_B
        count = weights_B.sum()
        metrics = {
            name: ((loss_B.masked_fill(~rows_B, 0.0) * weights_B).sum(), count) for name, loss_B in losses.items()
        }
        total = torch.stack([metrics[name][0] for name in losses]).sum()
        labelled_B = (batch.token_rows(self.config.tokens) >= 0).any(1)
        metrics["accuracy"] = (scores.hits, counted_BN.sum())
        metrics[INFEASIBLE] = ((labelled_B & ~plan.rows_B).sum(), labelled_B.sum())
        return LossOutput(total, count, metrics)

    def read(self, ids_BN: Tensor, lengths_B: Tensor, prompt: Memory, ctx: StepContext | None = None) -> Written:
        """Returns what the decoder attends to.

        Args:
            ids_BN: tokens or units to read, padded with any negative id, at least one column.
            lengths_B: ids of each row, on the host.
            prompt: frames of the encoder; rows of length 0 have none.
            ctx: seed and step of training; None: outside of it.
        """
        frames, _ = self.tower(ids_BN.clamp(min=0), lengths_B, ctx)
        inside_BN = frames.valid_BF()
        mean_BD = frames.x_BFD.masked_fill(~inside_BN[:, :, None], 0.0).sum(1) / inside_BN.sum(1).clamp(min=1)[:, None]
        memories = (
            Memory(self.from_tower(frames.x_BFD), frames.lengths_B),
            Memory(self.from_prompt(prompt.x_BMD), prompt.lengths_B),
        )
        return Written(memories, self.length(mean_BD)[:, 0].float())

    def refine(self, first_BF: Tensor, memories: tuple[Memory, Memory]) -> list[Tensor]:
        """Returns all levels of units, (B, F) each, given the first one; the most probable unit of each frame."""
        levels = [first_BF]
        for refiner in self.refiners:
            chosen_BF = refiner(self._lower(levels), memories).argmax(2)
            levels.append(chosen_BF.masked_fill(first_BF < 0, -1))
        return levels

    def frames_of(self, ids_BN: Tensor, speed: float = 1.0) -> Tensor:
        """Returns frame labels (B, F), padded with -1, of units (B, N), with predicted durations of a frame or more."""
        assert self.durations is not None
        frames_BN = (self.durations(ids_BN).clamp(max=LONGEST).expm1() / speed).round().clamp(min=1).long()
        return frames_of_runs(ids_BN, frames_BN.masked_fill(ids_BN < 0, 0))

    def prompt_of(self, encoded: EncoderOutput) -> Memory:
        """Returns the first seconds of an encoder's output as a prompt."""
        frames = self.frames(encoded)
        most = max(1, round(self.config.prompt_seconds * encoded.rate_hz))
        return Memory(frames.x_BFD[:, :most], frames.lengths_B.clamp(max=most))

    def no_prompt(self, rows: int) -> Memory:
        """Returns the prompt of rows without one."""
        weight = self.from_prompt.weight
        return Memory(weight.new_zeros(rows, 1, weight.shape[1]), torch.zeros(rows, dtype=torch.int64))

    def _levels(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns frame labels of all levels, (B, F) each, -1 where one of them is missing."""
        none_BF = torch.full((len(batch.keys), 1), -1, device=batch.wave_BT.device)
        found = [batch.targets.get(name, none_BF) for name in self.config.levels]
        width = min(labels_BF.shape[1] for labels_BF in found)
        found = [labels_BF[:, :width] for labels_BF in found]
        missing_BF = torch.stack(found).amin(0) < 0
        return tuple(labels_BF.masked_fill(missing_BF, -1) for labels_BF in found)

    def _counts(self, batch: Batch, units_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers of ids to read and to write, (B,) each, on the host."""
        tokens_B = (batch.token_rows(self.config.tokens) >= 0).sum(1)
        return (tokens_B, units_B) if self.config.speaks else (units_B, tokens_B)

    def _sources(self, batch: Batch, plan: HeadPlan) -> Sources:
        assert plan.sizes_B is not None
        device, rows_B, units_B = batch.wave_BT.device, plan.rows_B, plan.sizes_B * plan.rows_B
        rows_B1 = rows_B.to(device)[:, None]
        levels = tuple(labels_BF.masked_fill(~rows_B1, -1) for labels_BF in self._levels(batch))
        runs = runs_of(levels[0], int(units_B.max()))
        text_BN = batch.token_rows(self.config.tokens).to(device).masked_fill(~rows_B1, -1)
        read_BN, written_BN = (text_BN, runs.ids_BN) if self.config.speaks else (runs.ids_BN, text_BN)
        read_B, written_B = (count_B * rows_B for count_B in self._counts(batch, units_B))
        read_BN = F.pad(read_BN, (0, 1), value=-1)[:, : max(int(read_B.max()), 1)]
        return Sources(read_BN, read_B, written_BN[:, : int(written_B.max())], written_B, runs, levels)

    def _prompt(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, rngs: list[np.random.Generator]) -> Memory:
        """Draws for each row a part of another one with the same label; rows without such a row have none."""
        frames, rows = self.frames(encoded), plan.rows_B.tolist()
        labels = batch.label_values(self.config.same) if self.config.same else ("any",) * len(rows)
        most = max(1, round(self.config.prompt_seconds * encoded.rate_hz))
        chosen, first, lengths = [], [], []
        for row, rng in enumerate(rngs):
            pick, dropped, place = rng.random(3)
            others = [
                other
                for other, label in enumerate(labels)
                if other != row and rows[other] and label and label == labels[row]
            ]
            hidden = self.training and dropped < self.config.prompt_drop
            other = others[int(pick * len(others))] if others else row
            total = int(frames.lengths_B[other]) if others and rows[row] and not hidden else 0
            chosen.append(other)
            lengths.append(min(total, most))
            first.append(int(place * (total - lengths[-1] + 1)))
        device, width = frames.x_BFD.device, min(most, frames.x_BFD.shape[1])
        index_BM = torch.tensor(first, device=device)[:, None] + torch.arange(width, device=device)
        index_BM = index_BM.clamp(max=frames.x_BFD.shape[1] - 1)
        x_BMD = frames.x_BFD[torch.tensor(chosen, device=device)[:, None], index_BM]
        return Memory(x_BMD, torch.tensor(lengths))

    def _decoded(self, given: Written, found: Sources) -> tuple[Scores, Tensor]:
        """Returns the loss of the written ids, and which places count, (B, N + 1)."""
        device = found.read_BN.device
        lengths_B1 = found.written_B.to(device)[:, None]
        ids_BN = found.written_BN
        begin_B1 = torch.full_like(lengths_B1, self.start)
        read_BN = torch.cat([begin_B1, ids_BN.masked_fill(ids_BN < 0, self.end)], 1)
        places_N = torch.arange(read_BN.shape[1], device=device)
        targets_BN = F.pad(ids_BN, (0, 1), value=-1).masked_fill(places_N == lengths_B1, self.end)
        counted_BN = (places_N <= lengths_B1) & (lengths_B1 > 0)
        logits_BNV = self.decoder(read_BN, given.memories)
        return _scores(logits_BNV, targets_BN, counted_BN, self.config.label_smoothing), counted_BN

    def _of_lines(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Returns BERT's loss of a line of `data.lines` for each row, (B,); a line that is too long has none."""
        if not self.config.lines_of or not batch.has_lines:  # alike on all ranks, each of which must run the tower
            return {}
        lines_BN = F.pad(batch.line_rows(self.config.lines_of), (0, 1), value=-1)
        lengths_B = (lines_BN >= 0).sum(1)
        lengths_B = lengths_B * (lengths_B <= self.config.max_read)
        ids_BN = lines_BN[:, : max(int(lengths_B.max()), 1)].to(batch.wave_BT.device)
        rngs = [keyed_rng(ctx.seed, ctx.step, key, "line") for key in batch.keys]
        return {"lines": self.config.masked_weight * self._masked(ids_BN, lengths_B, rngs, ctx)}

    def _masked(self, read_BN: Tensor, read_B: Tensor, rngs: list[np.random.Generator], ctx: StepContext) -> Tensor:
        """Returns BERT's loss of each row, (B,), the mean over its drawn ids; one at least is drawn."""
        size = read_BN.shape
        drawn, hidden, other = np.zeros(size, bool), np.zeros(size, bool), np.full(size, -1)
        for row, (rng, length) in enumerate(zip(rngs, read_B.tolist(), strict=True)):
            if not length:
                continue
            drawn[row, :length] = rng.random(length) < SHARE_MASKED
            drawn[row, rng.integers(length)] = True
            kind = rng.random(length)
            hidden[row, :length] = kind < 0.8
            other[row, :length] = np.where(kind < 0.9, rng.integers(self.reads, size=length), -1)
        device = read_BN.device
        drawn_BN, hidden_BN, other_BN = (torch.from_numpy(part).to(device) for part in (drawn, hidden, other))
        shown_BN = torch.where(drawn_BN & (other_BN >= 0), other_BN, read_BN)
        shown_BN = shown_BN.masked_fill(drawn_BN & hidden_BN, self.reads)
        _, logits_BNV = self.tower(shown_BN.clamp(min=0), read_B, ctx)
        return _scores(logits_BNV, read_BN, drawn_BN, 0.0).loss_B

    def _of_units(self, given: Written, found: Sources) -> dict[str, Tensor]:
        """Returns the losses of durations and of further levels, (B,) each."""
        if self.durations is None:
            return {}
        known_BN = found.runs.ids_BN >= 0
        errors_BN = (self.durations(found.runs.ids_BN) - found.runs.frames_BN.float().log1p()).square()
        losses = {"duration": errors_BN.masked_fill(~known_BN, 0.0).sum(1) / known_BN.sum(1).clamp(min=1)}
        for level, refiner in enumerate(self.refiners, start=1):
            logits_BFV = refiner(self._lower(found.levels[:level]), given.memories)
            target_BF = found.levels[level]
            losses[f"level_{level}"] = _scores(
                logits_BFV, target_BF, target_BF >= 0, self.config.label_smoothing
            ).loss_B
        return losses

    def _of_audio(
        self, prompt: Memory, found: Sources, batch: Batch, plan: HeadPlan, ctx: StepContext
    ) -> dict[str, Tensor]:
        """Returns the losses of audio, (B,) each; the vocoder learns from half recorded, half predicted mel frames."""
        if self.audio is None:
            return {}
        self.audio.require_same_mel()
        places_B2 = None
        if self.training:
            draws = [keyed_rng(ctx.seed, ctx.step, key, "units audio").random(2) for key in batch.keys]
            places_B2 = torch.tensor(np.array(draws))
        return self.audio.losses(found.levels, prompt, own_speech(batch), batch.lengths_B * plan.rows_B, places_B2)

    def _lower(self, levels: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Returns the ids of a refiner's input, (B, F, levels), -1 beyond each row: each level has ids of its own."""
        ids_BFL = torch.stack([labels_BF + number * self.config.units for number, labels_BF in enumerate(levels)], 2)
        return ids_BFL.masked_fill(levels[0][:, :, None] < 0, -1)


class Scores(NamedTuple):
    """loss_B: mean cross-entropy of each row's places that count.  hits: number of places that are right."""

    loss_B: Tensor
    hits: Tensor


def _scores(logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor, smoothing: float) -> Scores:
    with full_precision(logits_BNV.device):
        losses_BN = F.cross_entropy(
            logits_BNV.float().flatten(0, 1),
            targets_BN.clamp(min=0).flatten(),
            reduction="none",
            label_smoothing=smoothing,
        ).view_as(targets_BN)
    loss_B = losses_BN.masked_fill(~counted_BN, 0.0).sum(1) / counted_BN.sum(1).clamp(min=1)
    return Scores(loss_B, ((logits_BNV.argmax(-1) == targets_BN) & counted_BN).sum())


def build(config: Config, shape: ModelShape) -> Units:
    return Units(config, shape)
