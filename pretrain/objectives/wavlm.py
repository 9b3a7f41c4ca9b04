"""WavLM: HuBERT's prediction from audio mixed with other speakers or noise (arXiv 2110.13900, §III)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.audio.transforms import draw_stretch, mix_in
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.objectives import MicroBatchPlan
from pretrain.self_supervision.masked_prediction import MaskedUnits, MaskedUnitsConfig, UnitsPlan


@config
class Config(MaskedUnitsConfig):
    name: Literal["wavlm"] = "wavlm"
    mix_prob: Annotated[float, about("probability that speech or noise is mixed into an utterance", ge=0, le=1)] = 0.5
    noise_share: Annotated[float, about("share of the mixtures with noise instead of speech", ge=0, le=1)] = 0.1
    speech_snr_db: Annotated[
        tuple[float, float], about("range of the SNR of the main utterance over the other, in dB")
    ] = (
        -5.0,
        5.0,
    )
    noise_snr_db: Annotated[tuple[float, float], about("range of the SNR of the main utterance over noise, in dB")] = (
        -5.0,
        20.0,
    )


@dataclass
class MixturePlan(UnitsPlan):
    mixed_BT: Tensor
    """The student's input, (B, T)."""


class WavLM(MaskedUnits):
    """Predicts the units of the clean main utterance (§III-B, algorithm 1; the loss is HuBERT's)."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.couples = frozenset({"batch"}) if config.mix_prob and config.noise_share < 1 else frozenset()

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MixturePlan:
        units = super().prepare(model, batch, ctx)
        return MixturePlan(units.mask, units.count, units.labels_N, self.mix(batch, ctx))

    def audio(self, batch: Batch, plan: MicroBatchPlan) -> Tensor:
        assert isinstance(plan, MixturePlan)
        return plan.mixed_BT

    def mix(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Mixes a part of another utterance, or noise, into utterances with probability `mix_prob` (algorithm 1).

        As in the released `mixing_collated_audios`: U{0 … T/2} samples are mixed in at a random position; the other
        utterance may be the same one, or one that is a mixture already; the SNR is the ratio of the powers of whole
        utterances, not of the part.

        Args:
            batch: (B, T) audio, which is not changed.
            ctx: seed and step that key the draws.

        Returns:
            The student's input, (B, T).
        """
        mixed_BT = batch.wave_BT.clone()
        rows = [wave_T[:length] for wave_T, length in zip(mixed_BT, batch.lengths_B.tolist(), strict=True)]
        for main_T, key in zip(rows, batch.keys, strict=True):
            rng = keyed_rng(ctx.seed, ctx.step, key, "mixture")
            if rng.random() >= self.config.mix_prob:
                continue
            longest = len(main_T) // 2
            if rng.random() < self.config.noise_share:
                other_T = torch.from_numpy(pink_noise(max(longest, 1), rng)).to(mixed_BT.device)
                snr_db = self.config.noise_snr_db
            else:
                other_T, snr_db = rows[int(rng.integers(len(rows)))], self.config.speech_snr_db
            stretch = draw_stretch(rng, len(main_T), len(other_T), longest)
            mix_in(main_T, other_T, stretch, rng.uniform(*snr_db))
        return mixed_BT


def pink_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns noise whose power falls by 3 dB per octave, (length,) float32; used instead of a noise corpus."""
    spectrum = rng.standard_normal(length // 2 + 1) + 1j * rng.standard_normal(length // 2 + 1)
    return np.fft.irfft(spectrum / np.sqrt(np.arange(length // 2 + 1) + 1), n=length).astype(np.float32)


def build(config: Config, shape: ModelShape) -> WavLM:
    return WavLM(config, shape)
