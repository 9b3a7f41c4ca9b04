"""Speech synthesis from the tokens of each segment's text, in a voice that the encoder's frames describe.

FastSpeech 2 (arXiv 2006.04558) with durations learned inside (arXiv 2108.10447) and, as in FastSpeech 2s, straight on
to the waveform, by an iSTFT vocoder (Vocos, arXiv 2306.00814). There is no adversarial loss: it would need a second
optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from data_pipeline.labels.pitch import LOWEST_HZ, STEPS_PER_OCTAVE
from pretrain.interfaces.configs import FrameLabels, HeadConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMedia, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.models.synthesis.aligner import forward_sum
from pretrain.models.synthesis.flow import FlowDraws, drawn
from pretrain.models.synthesis.mel_convention import MelConvention
from pretrain.models.synthesis.spectral_loss import SpectralLoss
from pretrain.models.synthesis.style import Measured, Style, StyleWords, StyleWordsConfig, described, padded
from pretrain.models.synthesis.synthesizer import (
    AS_DRAWN,
    Controls,
    Drawing,
    Recorded,
    SynthesisOutput,
    Synthesizer,
    SynthesizerConfig,
    TokenValues,
)
from pretrain.models.synthesis.waveform_loss import LEAST_FRAMES, own_speech, waveform_loss
from pretrain.nn.numerics import full_precision, pad_audio
from pretrain.nn.spectral import LogMel


@config
class Config(HeadConfig):
    name: Literal["synthesis"] = "synthesis"
    tokens: Annotated[str, about("name in data.tokens of the tokens to speak", min_length=1)] = "text"
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=1)]
    max_tokens: Annotated[int, about("longest text; longer ones do not count", ge=1, le=65_536)] = 1_000
    pitch: Annotated[
        str,
        about("name in data.targets of the labels of `auricle targets features=pitch`; empty: pitch is not predicted"),
    ] = ""
    n_mels: Annotated[int, about("mel bands", ge=8, le=256)] = 80
    style_dim: Annotated[int, about("channels of the voice that is taken from the encoder", ge=1)] = 16
    style_drop: Annotated[
        float,
        about("share of the segments whose voice is hidden in training, so that none is needed later", ge=0, lt=1),
    ] = 0.2
    style_words: Annotated[
        StyleWordsConfig | None,
        about(
            "words that describe the segment, from labels of data.labels, pitch and rate; null: none. They are needed "
            "where the voice is hidden: raise style_drop"
        ),
    ] = None
    vocoder_frames: Annotated[int, about("mel frames of each segment that the vocoder learns from", ge=8)] = 64
    synthesizer: Annotated[SynthesizerConfig, about("sizes")] = dataclasses.field(default_factory=SynthesizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.style_words is not None and not self.pitch:
            refuse("style_words", "{…}", "are made of the measured pitch, too; set pitch=NAME")

    @property
    def twice_differentiable(self) -> bool:
        """False: the aligner's sum over alignments has no second derivative."""
        return False

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token set of the text."""
        return {self.tokens: self.vocabulary}

    @property
    def frame_labels(self) -> tuple[FrameLabels, ...]:
        """The pitch labels, if pitch is predicted."""
        return (FrameLabels(self.pitch, 100.0, 0, "pitch"),) if self.pitch else ()


class Synthesis(Head):
    """Predicts each segment's mel frames from its text, and audio from mel frames.

    Loss per row, times its mel frames: L1 of the mel frames; squared errors of ln(1 + duration), pitch in octaves and
    energy, means over tokens; −ln of all monotonic alignments; the spectral distance of a short part of the audio. Half
    of that audio is made from predicted mel frames, so that text leads to the waveform in one pass, and half from the
    recording's, so that the vocoder also copies recordings. With `synthesizer.decoder=flow` also the squared error of
    the flow's velocity; its vocoder learns from recorded mel frames alone, which are as sharp as the flow's.

    Of a mixture, the segment's own part is learned (`data.sources`), in the voice of the mixture.
    A row without tokens, or with fewer mel frames than tokens and two marks, does not count.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.mel = LogMel(config.n_mels, normalize="fixed")
        self.first, self.last = config.vocabulary, config.vocabulary + 1
        self.style = Style(shape.dim, config.style_dim, config.synthesizer.dim)
        words = config.style_words
        self.words = None if words is None else StyleWords(words.dim, config.synthesizer.dim)
        self.synthesizer = Synthesizer(config.synthesizer, config.vocabulary + 2, self.mel, bool(config.pitch))
        self.distance = SpectralLoss(self.mel)
        self._convention = MelConvention(self.mel)
        self.register_buffer("mel_sha256", self._convention.checksum())
        self.mel_sha256: Tensor

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        self.require_same_mel()
        tokens_B = (batch.token_rows(self.config.tokens) >= 0).sum(1)
        frames_B = self.mel.lengths(batch.lengths_B)
        fits_B = (tokens_B > 0) & (tokens_B <= self.config.max_tokens) & (tokens_B + 2 <= frames_B)
        rows_B = fits_B & (model.frontend.frame_lengths(batch.lengths_B) > 0)
        return HeadPlan((frames_B * rows_B).sum().double(), rows_B)

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def require_same_mel(self) -> None:
        """Compares the definition of the mel frames with that of the checkpoint. Raises ConfigError if they differ."""
        self._convention.require(self.mel_sha256, self.config.n_mels)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        device = batch.wave_BT.device
        rows_BN = batch.token_rows(self.config.tokens)
        labelled_B = (rows_BN >= 0).any(1)
        infeasible = (labelled_B & ~plan.rows_B).sum()
        tokens_BN, tokens_B = (ids.to(device) for ids in self.with_marks(rows_BN, plan.rows_B))
        wave_BT = pad_audio(own_speech(batch), self.mel.window)
        mel = self.mel(wave_BT, batch.lengths_B * plan.rows_B)
        frames = mel.lengths_B.tolist()  # on the host, as the lengths of the batch
        draws = [EVALUATED] * len(batch.keys)
        if self.training:
            draws = _draw(batch, ctx, frames, self.config)
        if self.synthesizer.flow is not None:
            draws = [draw._replace(copied=True) for draw in draws]
        mel, rows_B = mel._replace(lengths_B=mel.lengths_B.to(device)), plan.rows_B.to(device)
        styled_B = torch.tensor([draw.styled for draw in draws], device=device)
        style_BD, recorded = self.style(self.frames(encoded), styled_B), self._recorded(batch, mel, frames, ctx)
        if self.words is not None:
            style_BD = style_BD + self.words(self._described(batch, recorded, tokens_B, ctx).to(device))
        spoken: SynthesisOutput = self.synthesizer(tokens_BN, tokens_B, style_BD, recorded)
        with full_precision(device):
            losses = self._losses(spoken, mel, tokens_B)
        made_BT = None
        if self.synthesizer.vocoder is not None:
            losses["waveform"], made_BT = self._waveform(wave_BT, mel, spoken.mel_BFD, draws)
        frames_B = mel.lengths_B.clamp(min=1)
        summed = {name: loss_B.masked_fill(~rows_B, 0.0) for name, loss_B in losses.items()}
        count = mel.lengths_B.sum()
        metrics = {name: ((loss_B * frames_B).sum(), count) for name, loss_B in summed.items()}
        metrics[INFEASIBLE] = (infeasible, labelled_B.sum())
        self.keep_media(
            lambda: _media(wave_BT, mel=mel, mel_hop=self.mel.hop, spoken=spoken, tokens_B=tokens_B, made_BT=made_BT)
        )
        total = torch.stack([metrics[name][0] for name in summed]).sum()
        return LossOutput(total, count, metrics)

    def with_marks(self, ids_BN: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens between a first and a last mark, (B, N + 2), and their number (B,); 0 where not `rows_B`.

        Args:
            ids_BN: ids of each row, padded with -1.
            rows_B: bool.
        """
        counts_B = (ids_BN >= 0).sum(1) * rows_B
        ids_BN = ids_BN[:, : int(counts_B.max()) if len(ids_BN) else 0]
        mark_B1 = torch.full_like(counts_B, self.last)[:, None]
        read_BN = torch.cat(
            [torch.full_like(mark_B1, self.first), ids_BN.masked_fill(ids_BN < 0, self.last), mark_B1], 1
        )
        return read_BN, (counts_B + 2) * rows_B

    def speak(
        self,
        tokens_BN: Tensor,
        voice: EncoderOutput | None,
        controls: Controls,
        drawing: Drawing = AS_DRAWN,
        words: Sequence[int] = (),
    ) -> Frames:
        """Returns normalised log-mel frames of texts, zero beyond each row's.

        Args:
            tokens_BN: ids of each row, padded with -1; each row has at least one.
            voice: the encoder's output for one recording of the wanted voice; None: the learned voice.
            controls: changes of speed, pitch and energy.
            drawing: for decoder=flow.
            words: ids of the style's words; for a head with `style_words`.
        """
        rows_B = torch.ones(len(tokens_BN), dtype=torch.bool, device=tokens_BN.device)
        style_1D = self.style_of(voice, words)
        return self.synthesizer.speak(*self.with_marks(tokens_BN, rows_B), style_1D, controls, drawing)

    def style_of(self, voice: EncoderOutput | None, words: Sequence[int] = ()) -> Tensor:
        """Returns the vector (1, dim) of a recording's voice and of words; None: of the learned voice."""
        device = self.mel_sha256.device
        if voice is not None:
            frames = self.frames(voice)
        else:
            nothing = torch.zeros(1, 1, self.style.reduce.in_features, device=device)
            frames = Frames(nothing, torch.zeros(1, dtype=torch.int64, device=device), 1.0)
        style_1D: Tensor = self.style(frames, torch.full((1,), voice is not None, device=device))
        if words:
            assert self.words is not None
            style_1D = style_1D + self.words(padded([words]).to(device))
        return style_1D

    def _described(self, batch: Batch, recorded: Recorded, tokens_B: Tensor, ctx: StepContext) -> Tensor:
        """Returns the words of each row, (B, W), on the host; drawn in training, all outside of it."""
        config = self.config.style_words
        assert config is not None
        assert recorded.pitch_BF is not None
        assert recorded.voiced_BF is not None
        voiced_B = recorded.voiced_BF.sum(1)
        octave_B = (recorded.pitch_BF * recorded.voiced_BF).sum(1) / voiced_B.clamp(min=1)
        f0_B = (100.0 * torch.exp2(octave_B) * (voiced_B > 0)).tolist()
        rate_B = (recorded.mel.rate_hz * tokens_B / recorded.mel.lengths_B.clamp(min=1)).tolist()
        labels = (batch.label_values(name) if name else [""] * len(f0_B) for name in (config.sex, config.age))
        rows = []
        for key, values in zip(batch.keys, zip(*labels, f0_B, rate_B, strict=True), strict=True):
            rng = keyed_rng(ctx.seed, ctx.step, key, "style words") if self.training else None
            rows.append(described(Measured(*values), config, rng))
        return padded(rows)

    def _recorded(self, batch: Batch, mel: Frames, frames: list[int], ctx: StepContext) -> Recorded:
        draws = None
        if self.synthesizer.flow is not None:
            rngs = [keyed_rng(ctx.seed, ctx.step, key, "synthesis flow") for key in batch.keys]
            draws = FlowDraws(*(part.to(mel.x_BFD.device) for part in drawn(rngs, frames, *mel.x_BFD.shape[1:])))
        if not self.config.pitch:
            return Recorded(mel, draws=draws)
        none_BF = torch.full((len(batch.keys), 0), -1, device=mel.x_BFD.device)
        labels_BF = batch.targets.get(self.config.pitch, none_BF)
        width = mel.x_BFD.shape[1]
        labels_BF = nn.functional.pad(labels_BF, (0, max(width - labels_BF.shape[1], 0)), value=-1)[:, :width]
        return Recorded(mel, octaves(labels_BF), labels_BF > 0, draws)

    def _losses(self, spoken: SynthesisOutput, mel: Frames, tokens_B: Tensor) -> dict[str, Tensor]:
        """Returns the losses of each row, per frame."""
        least_B = mel.lengths_B.clamp(min=1)
        losses = {
            "mel": (spoken.mel_BFD - mel.x_BFD).abs().mean(2).sum(1) / least_B,
            "alignment": forward_sum(spoken.alignment_BFN, tokens_B.clamp(min=1), least_B) / least_B,
            "duration": _squared(spoken.duration),
            "energy": _squared(spoken.energy),
        }
        if spoken.pitch is not None:
            losses["pitch"] = _squared(spoken.pitch)
        if spoken.flow_B is not None:
            losses["flow"] = spoken.flow_B
        return losses

    def _waveform(
        self, wave_BT: Tensor, mel: Frames, predicted_BFD: Tensor, draws: list[RowDraws]
    ) -> tuple[Tensor, Tensor]:
        """Returns the distance of the vocoder's audio from the recording, (B,), and the audio (B, T).

        In training it is a drawn part of each row, else the whole of it, made from predicted mel frames.
        """
        assert self.synthesizer.vocoder is not None
        device = wave_BT.device
        width = self.config.vocoder_frames if self.training else max(mel.x_BFD.shape[1], LEAST_FRAMES)
        first_B = torch.tensor([draw.first for draw in draws], device=device)
        copied_B = torch.tensor([draw.copied for draw in draws], device=device)
        source_BFD = torch.where(copied_B[:, None, None], mel.x_BFD, predicted_BFD)
        return waveform_loss(self.synthesizer.vocoder, self.distance, wave_BT, mel, source_BFD, first_B, width)


class RowDraws(NamedTuple):
    """One row: whether its voice is used, whether the vocoder reads the recording's mel, its first frame."""

    styled: bool
    copied: bool
    first: int


EVALUATED = RowDraws(styled=True, copied=False, first=0)
"""Values outside of training."""


def _draw(batch: Batch, ctx: StepContext, frames: list[int], config: Config) -> list[RowDraws]:
    found = []
    for key, length in zip(batch.keys, frames, strict=True):
        rng = keyed_rng(ctx.seed, ctx.step, key, "synthesis")
        styled, copied, place = rng.random(3)
        first = int(place * (max(length - config.vocoder_frames, 0) + 1))
        found.append(RowDraws(bool(styled >= config.style_drop), bool(copied < 0.5), first))
    return found


def _squared(values: TokenValues) -> Tensor:
    """Returns the mean squared error over each row's tokens with a target, (B,)."""
    errors_BN = (values.predicted_BN - values.target_BN).square().masked_fill(~values.known_BN, 0.0)
    return errors_BN.sum(1) / values.known_BN.sum(1).clamp(min=1)


def _media(
    wave_BT: Tensor, mel: Frames, mel_hop: int, spoken: SynthesisOutput, tokens_B: Tensor, made_BT: Tensor | None
) -> HeadMedia | None:
    """Shows the first row that counts; None where no row does."""
    if not bool((mel.lengths_B > 0).any()):
        return None
    row = int((mel.lengths_B > 0).int().argmax())
    frames, tokens = int(mel.lengths_B[row]), int(tokens_B[row])
    shown = {
        "alignment": spoken.alignment_BFN[row, :frames, :tokens].softmax(1).T,
        "mel_recorded": mel.x_BFD[row, :frames].T,
        "mel_predicted": spoken.mel_BFD[row, :frames].T,
    }
    audio = {"recorded": wave_BT[row, : frames * mel_hop]}
    if made_BT is not None:
        audio["spoken"] = made_BT[row, : frames * mel_hop]
    return HeadMedia(shown, audio)


def octaves(labels_BF: Tensor) -> Tensor:
    """Returns pitch labels as octaves above 100 Hz, fp32; 0 where there is no voice or no label."""
    offset = torch.log2(torch.tensor(LOWEST_HZ / 100.0)).item()
    return ((labels_BF - 1) / STEPS_PER_OCTAVE + offset).float().masked_fill(labels_BF <= 0, 0.0)


def build(config: Config, shape: ModelShape) -> Synthesis:
    return Synthesis(config, shape)
