"""What a recipe amounts to: parameters, audio per update, operations per second of audio, beside published figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.model import build_model
from pretrain.types import SpeechModel

CROP_SECONDS = 15.0
PUBLISHED: dict[str, tuple[float | None, float, str]] = {
    "wav2vec2_base": (95.0, 93.6, "arXiv 2006.11477; fairseq wav2vec2_base_librispeech.yaml"),
    "wav2vec2_large": (317.4, 162.0, "arXiv 2006.11477, §4.2"),
    "hubert_base": (94.7, 46.7, "arXiv 2106.07447; fairseq hubert_base_librispeech.yaml"),
    "wavlm_base": (94.7, 46.7, "arXiv 2110.13900"),
    "data2vec_base": (None, 63.0, "arXiv 2202.03555; fairseq data2vec base_librispeech.yaml"),
    "data2vec2_base": (None, 8.3, "arXiv 2212.07525; fairseq data2vec v2"),
    "dinosr_base": (None, 63.0, "arXiv 2305.10005"),
}
"""Recipe -> (parameters in millions where a source gives them, minutes of audio per update, source)."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table. parameters: all that are trained; model_parameters: front end and encoder alone."""

    name: str
    parameters: int
    model_parameters: int
    frames_hz: float
    minutes_per_update: float
    updates: int
    gflop_per_audio_second: float
    published_parameters: float | None
    published_minutes: float | None
    source: str


def summarize(config: Config) -> Recipe:
    """Builds the model of `config` (random weights) and counts."""
    module = build_model(config)
    published: tuple[float | None, float | None, str] = PUBLISHED.get(config.name, (None, None, ""))
    return Recipe(
        name=config.name,
        parameters=sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
        model_parameters=sum(weight.numel() for weight in module.model.parameters()),
        frames_hz=module.model.frontend.rate_hz,
        minutes_per_update=config.data.batch_seconds / 60,
        updates=config.train.steps,
        gflop_per_audio_second=forward_gflop(module.model, CROP_SECONDS),
        published_parameters=published[0],
        published_minutes=published[1],
        source=published[2],
    )


def forward_gflop(model: SpeechModel, seconds: float) -> float:
    """Operations (10⁹) of one forward pass per second of audio, for crops of `seconds`; training takes about thrice.

    Counted at one and two seconds: attention grows with the square of the length, all else with the length.
    """
    one, two = _flops(model.eval(), 1.0), _flops(model, 2.0)
    square = (two - 2 * one) / 2
    return (one - square + square * seconds) / 1e9


@torch.no_grad()
def _flops(model: SpeechModel, seconds: float) -> float:
    # a window is 400 samples and a hop 160: with 240 more than whole seconds, frames are whole multiples, too
    samples = int(seconds * SAMPLE_RATE) + 240
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, samples), torch.tensor([samples]))
    return float(counter.get_total_flops())
