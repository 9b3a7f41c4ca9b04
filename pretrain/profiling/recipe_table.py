"""Parameters, audio per update and operations of recipes, with published figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config import Config
from pretrain.interop.hf_export import exports
from pretrain.profiling.flops import forward_gflop
from pretrain.train_module import build_model

CROP_SECONDS = 15.0


OURS = "unpublished: auricle's own"


@dataclass(frozen=True)
class Published:
    """Published figures. millions: parameters; minutes: of audio per update; gflop: per audio second.

    None for figures that the source does not give: data2vec, data2vec 2.0, DinoSR and SpeechBrain's BEST-RQ report no
    parameter counts of their speech models; the BEST-RQ paper's own model has 24 large blocks.
    """

    millions: float | None
    minutes: float | None
    gflop: float | None
    source: str


# operations: derived for crops of 15 s; the papers report none
PUBLISHED = {
    "wav2vec2_base": Published(95.0, 93.6, 15.3, "arXiv 2006.11477; fairseq wav2vec2_base_librispeech.yaml"),
    "wav2vec2_large": Published(317.4, 162.0, 39.6, "arXiv 2006.11477, §4.2"),
    "hubert_base": Published(94.7, 46.7, 15.3, "arXiv 2106.07447; fairseq hubert_base_librispeech.yaml"),
    "wavlm_base": Published(94.7, 46.7, 15.3, "arXiv 2110.13900"),
    "data2vec_base": Published(None, 63.0, 15.3, "arXiv 2202.03555; fairseq data2vec base_librispeech.yaml"),
    "data2vec2_base": Published(None, 8.3, 15.3, "arXiv 2212.07525; fairseq data2vec v2"),
    "dinosr_base": Published(None, 63.0, 15.3, "arXiv 2305.10005"),
    "best_rq_base": Published(None, 120.0, None, "arXiv 2202.01855; SpeechBrain's LibriSpeech recipe"),
    "efficient_base": Published(None, None, 4.8, f"{OURS} combination (recipes of Fast-HuBERT and BEST-RQ)"),
    "multitask_base": Published(None, 120.0, None, f"{OURS} combination; compare best_rq_base"),
    "conformer_aed_base": Published(
        116.15,
        291.7,
        None,
        "ESPnet2 librispeech/asr1, train_asr_conformer10_hop_length160.yaml",
    ),
    "whisper_like_small": Published(244.0, 128.0, None, "arXiv 2212.04356, tables 1 and 17: 51,865 tied tokens"),
    "time_contrastive_base": Published(None, None, 15.3, f"{OURS}; compare wav2vec 2.0 BASE"),
}
"""Published figures by recipe; all other recipes are auricle's own small ones."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table. parameters: trained ones."""

    name: str
    parameters: int
    frames_hz: float
    minutes_per_update: float
    updates: int
    gflop_per_audio_second: float
    published: Published
    hugging_face: bool
    """Whether it exports to Hugging Face."""


def recipe_row(config: Config) -> Recipe:
    """Builds the model of `config` without memory and counts parameters and operations."""
    with torch.device("meta"):
        module = build_model(config)
    return Recipe(
        name=config.name,
        parameters=sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
        frames_hz=module.model.frontend.rate_hz,
        minutes_per_update=config.data.batch_seconds / 60,
        updates=config.train.steps,
        gflop_per_audio_second=forward_gflop(module.model, CROP_SECONDS),
        published=PUBLISHED.get(config.name, Published(None, None, None, OURS)),
        hugging_face=exports(config),
    )
