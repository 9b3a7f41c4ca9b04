"""WavLM: HuBERT's prediction from audio with other speakers and noise mixed in (arXiv 2110.13900, §III-B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.keyed_random import keyed_rng
from data_pipeline.schema import about, config
from data_pipeline.types import Batch
from pretrain.nn.masked_units import MaskedUnits, MaskedUnitsConfig, UnitsPlan
from pretrain.types import ModelShape, Plan, SpeechModel, StepContext


@config
class Config(MaskedUnitsConfig):
    name: Literal["wavlm"] = "wavlm"
    mix_prob: Annotated[float, about("probability that something is mixed into an utterance", ge=0, le=1)] = 0.5
    noise_share: Annotated[float, about("share of the mixtures that are noise instead of speech", ge=0, le=1)] = 0.1
    speech_snr_db: Annotated[tuple[float, float], about("range of the main utterance over the other one, in dB")] = (
        -5.0,
        5.0,
    )
    noise_snr_db: Annotated[tuple[float, float], about("range of the main utterance over noise, in dB")] = (-5.0, 20.0)


@dataclass
class MixturePlan(UnitsPlan):
    mixed_BT: Tensor
    """The audio that the student hears."""


class WavLM(MaskedUnits):
    """The units are those of the clean main utterance."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.couples = frozenset({"batch"}) if config.mix_prob and config.noise_share < 1 else frozenset()

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> MixturePlan:
        units = super().prepare(model, batch, ctx)
        return MixturePlan(units.mask, units.labels_N, units.count, self.mix(batch, ctx))

    def audio(self, batch: Batch, plan: Plan) -> Tensor:
        assert isinstance(plan, MixturePlan)
        return plan.mixed_BT

    def mix(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Adds, with probability `mix_prob`, a stretch of another utterance of the batch or noise (algorithm 1).

        The stretch has a length of U{0 … T/2}; the other utterance may be the same one.
        """
        mixed_BT = batch.wave_BT.clone()
        lengths = batch.lengths_B.tolist()
        for row, key in enumerate(batch.keys):
            rng = keyed_rng(ctx.seed, ctx.step, key, "mixture")
            if rng.random() >= self.config.mix_prob:
                continue
            noise = rng.random() < self.config.noise_share
            partner = int(rng.integers(len(lengths)))
            length = int(rng.integers(min(lengths[row] // 2, lengths[row if noise else partner]) + 1))
            if length == 0:
                continue
            at = int(rng.integers(lengths[row] - length + 1))
            if noise:
                added = torch.from_numpy(pink_noise(length, rng)).to(mixed_BT.device)
                snr = rng.uniform(*self.config.noise_snr_db)
            else:
                begin = int(rng.integers(lengths[partner] - length + 1))
                added = batch.wave_BT[partner, begin : begin + length]
                snr = rng.uniform(*self.config.speech_snr_db)
            main_power = batch.wave_BT[row, : lengths[row]].square().mean()
            gain = (main_power / (10 ** (snr / 10) * added.square().mean()).clamp(min=1e-10)).sqrt()
            mixed_BT[row, at : at + length] += gain * added
        return mixed_BT


def pink_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls by 3 dB per octave, (length,) float32; stands in where there is no noise corpus."""
    spectrum = rng.standard_normal(length // 2 + 1) + 1j * rng.standard_normal(length // 2 + 1)
    return np.fft.irfft(spectrum / np.sqrt(np.arange(length // 2 + 1) + 1), n=length).astype(np.float32)


def build(config: Config, shape: ModelShape) -> WavLM:
    return WavLM(config, shape)
