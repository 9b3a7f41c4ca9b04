"""Tiny models for the contract suite: every objective and head found × two front ends × every encoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from data_pipeline.core.schema import load
from data_pipeline.core.types import IMAGE, LINE, WAY, Batch, Images
from pretrain import registry
from pretrain.config import Config
from pretrain.train_module import TrainModule, build_model

OBJECTIVES = [name for name in registry.names("objectives") if name != "none"]
"""Those with a loss; tests/unit/pretrain/objectives/test_none.py has the properties of the other one."""
ENCODERS = registry.names("encoders")
FRONTENDS: dict[str, dict[str, Any]] = {
    "log_mel": {"name": "log_mel", "n_mels": 40},
    "waveform_conv": {"name": "waveform_conv", "channels": 32, "norm": "layer"},
}
MULTISCALE = {"name": "multiscale", "n_mels": 20, "wave_channels": 8}
SMALL = {
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "ffn_dim": 64,
    "conv_positions_kernel": 16,
    "conv_positions_groups": 4,
    "n_codes": 32,
    "code_dim": 16,
    "projection_dim": 16,
    "negatives": 20,
    "mask_block": 2,
    "mask_span": 4,
    "units": 32,
    "decoder_dim": 32,
    "masks": 2,
    "vocabulary": 27,
}
"""Values of fields that set a size, for every plug-in that has the field."""


def small(kind: str, name: str, **values: Any) -> dict[str, Any]:
    """Returns a plug-in's config with small sizes."""
    fields = {field.name for field in dataclasses.fields(registry.config_type(kind, name))}
    if kind == "objectives":
        fields.discard("layers")  # of a teacher, not a number of blocks
    return {"name": name} | {field: value for field, value in SMALL.items() if field in fields} | values


U_SHAPE = small("encoders", "transformer", layers=3, half_rate_blocks=1)
RELABELLED = small(
    "objectives",
    "efficient",
    relabel_step=1,
    relabel_layer=1,
    relabel_units=24,
    predict_layers=[1, 2],
)
"""Fields that the recipes of the efficient default set and its dataclass does not."""
CASES = {name: small("objectives", name) for name in OBJECTIVES} | {"efficient, relabelled": RELABELLED}
"""Every objective, and further settings of one that take another path through the code."""

DECODER = {"layers": 1, "heads": 2, "ffn_dim": 32, "max_tokens": 24}
SEPARATION = {
    "name": "separation", "window": 512, "hop": 256, "hidden": 16, "recurrent_layers": 1, "embedding_dim": 4,
}  # fmt: skip
SYNTHESIZER = {
    "dim": 16,
    "layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
    "kernel": 3,
    "predictor_dim": 16,
    "aligner_dim": 16,
    "vocoder": {"dim": 16, "layers": 1, "inner": 32},
}
SYNTHESIS = small("heads", "synthesis", layers=[], n_mels=20, vocoder_frames=16, synthesizer=SYNTHESIZER)
HEADS: dict[str, dict[str, Any]] = {name: small("heads", name, layers=[]) for name in registry.names("heads")} | {
    "ctc": {"name": "ctc"},
    "ctc, mixed layers": {"name": "ctc", "layers": [0, 1, 2]},
    "ctc, tokens": {"name": "ctc", "tokens": "text", "vocabulary": 27},
    "sequence": small("heads", "sequence", layers=[], decoder=DECODER),
    "sequence, two memories": small(
        "heads", "sequence", layers=[], memory_layers=[1, 2], decoder=DECODER | {"dim": 16}
    ),
    "synthesis": SYNTHESIS,
    "synthesis, words": SYNTHESIS | {"pitch": "level_0", "style_words": {"age": "speaker", "dim": 8}},
    "synthesis, flow": SYNTHESIS
    | {"synthesizer": SYNTHESIZER | {"decoder": "flow", "flow": {"layers": 1, "inner": 16}}},
    "transducer": {"name": "transducer", "joint_dim": 16},
    "transducer, tokens": {"name": "transducer", "tokens": "text", "vocabulary": 27, "joint_dim": 16},
    "classifier": {"name": "classifier", "classes": ["ann", "bob", "eve"], "embedding_dim": 16},
    "separation": SEPARATION,
    "separation, waveforms of three": SEPARATION
    | {"sources": 3, "layers": [1, 2], "clustering": 0.0, "waveform_from": 0},
    "classifier, softmax": {"name": "classifier", "classes": ["ann", "bob"], "loss": "softmax", "embedding_dim": 16},
}
TOWER = {
    "name": "transformer", "dim": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "positions": "none",
    "dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0,
}  # fmt: skip
UNITS = small(
    "heads", "units", layers=[], units=12, levels=["level_0"], same="", prompt_drop=0.0, tower=TOWER, decoder=DECODER
)
HEADS["units"] = UNITS | {"levels": ["level_0", "level_1", "level_2"]}
HEADS["units, audio"] = UNITS | {
    "audio": {
        "n_mels": 20, "dim": 16, "layers": 1, "inner": 32, "style_dim": 4, "vocoder_frames": 16,
        "vocoder": {"dim": 16, "layers": 1, "inner": 32},
    },
}  # fmt: skip
HEADS["units, to text"] = UNITS | {"direction": "units_to_text"}
HEADS["joint_embedding"] = {
    "name": "joint_embedding",
    "embedding_dim": 16,
    "towers": {
        "text": {"embedding": {"name": "tokens", "vocabulary": 27}, "encoder": TOWER},
        "image": {"embedding": {"name": "patches", "size": 8, "channels": 1, "patch": 4}, "encoder": TOWER},
    },
}
HEADS["joint_embedding, softmax, queue"] = HEADS["joint_embedding"] | {
    "loss": "softmax",
    "queue": 6,
    "pairs": ["speech-text", "text-image"],
}
"""Every head, and further settings of some."""
SELF_SUPERVISED = frozenset({"reconstruction"})
"""Heads whose targets come from the audio alone."""


def make(
    objective: str,
    frontend: str = "log_mel",
    encoder: str = "transformer",
    seed: int = 0,
    precision: str = "fp32",
    heads: Mapping[str, Any] | None = None,
    **options: Any,
) -> TrainModule:
    """Returns a tiny TrainModule. `objective` is one of CASES; `heads` by name; `options` are further fields of it.

    `frontend` may also be "multiscale", and `encoder` "u_shape", a transformer with a block at half the rate.
    """
    values = {
        "data": {"shards": "none"},
        "objective": CASES.get(objective, {"name": objective}) | options,
        "heads": dict(heads or {}),
        "frontend": (FRONTENDS | {"multiscale": MULTISCALE})[frontend],
        "encoder": U_SHAPE if encoder == "u_shape" else small("encoders", encoder),
        "engine": {"precision": precision},
        "seed": seed,
    }
    return build_model(load(Config, values))


def speech_like(seconds: float, seed: int) -> torch.Tensor:
    """Returns gliding harmonics in bursts, (T,) samples: structure that a model can learn."""
    return _harmonics(seconds, seed).clone()


@functools.cache
def _harmonics(seconds: float, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    samples = int(seconds * 16_000)
    time = np.arange(samples) / 16_000
    pitch = 120 + 60 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    formant = 600 + 400 * np.sin(2 * np.pi * rng.uniform(1, 4) * time + rng.uniform(0, 6))
    wave = sum(np.sin(k * phase) * np.exp(-(((k * pitch - formant) / 300) ** 2)) for k in range(1, 15))
    wave = wave * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time)) + 0.02 * rng.standard_normal(samples)
    return torch.from_numpy(0.1 * wave / np.std(wave)).float()


def batch(seconds: tuple[float, ...] = (1.0, 0.7), width: float | None = None, first_seed: int = 0) -> Batch:
    """Returns utterances of these lengths, zero-padded to the longest or to `width` seconds."""
    waves = [speech_like(length, first_seed + row) for row, length in enumerate(seconds)]
    wave_BT = torch.zeros(len(waves), int((width or max(seconds)) * 16_000))
    for row, wave in enumerate(waves):
        wave_BT[row, : len(wave)] = wave
    keys = tuple(f"utterance-{first_seed + row}" for row in range(len(waves)))
    return Batch(wave_BT, torch.tensor([len(wave) for wave in waves]), keys, 0)


ALPHABET = " abcdefghijklmnopqrstuvwxyz"
TEXTS = ("go on", "a tool")
"""One text for each utterance of `batch()`; the second has a double letter."""
SPEAKERS = dict(zip(TEXTS, ("ann", "bob"), strict=True))


def labelled(batch: Batch, texts: tuple[str, ...] = TEXTS) -> Batch:
    """Returns the batch with all that heads learn from; a row whose text is "" has no label."""
    ids = [
        torch.tensor([ALPHABET.index(symbol) for symbol in text if symbol in ALPHABET], dtype=torch.int64)
        for text in texts
    ]
    ids_BN = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    speakers = tuple(SPEAKERS.get(text, "") for text in texts)
    ways = tuple(str(list(SPEAKERS).index(text)) if text in SPEAKERS else "" for text in texts)
    labels = {"text": texts, "speaker": speakers, WAY: ways}
    # two parts whose sum is the row, each loud where the other one is not
    share_T = 0.5 + 0.5 * torch.sin(torch.arange(batch.wave_BT.shape[1]) * (2 * torch.pi * 3 / 16_000))
    known_B1 = torch.tensor([bool(text) for text in texts])[:, None]
    parts = [batch.wave_BT * share * known_B1 for share in (share_T, 1 - share_T)]
    return dataclasses.replace(
        batch,
        targets={f"level_{level}": units(texts, level) for level in range(3)},
        labels=labels,
        tokens={"text": ids_BN, LINE.format("text"): lines(len(texts))},
        images={IMAGE: pictures(texts)},
        sources_BST=torch.stack(parts, dim=1),
    )


def lines(rows: int) -> torch.Tensor:
    """Returns tokens of a line of text for each row, (rows, 9) int64, padded with -1."""
    ids_RN = torch.arange(9)[None] + torch.arange(rows)[:, None] + 1
    return ids_RN.masked_fill(torch.arange(9)[None] >= 9 - torch.arange(rows)[:, None], -1)


def units(texts: tuple[str, ...], level: int) -> torch.Tensor:
    """Returns frame labels of 12 units for each text, (B, 30) int64, in runs of two to four frames; -1 for ""."""
    labels_BF = torch.full((len(texts), 30), -1)
    for row, text in enumerate(texts):
        rng = np.random.default_rng([level, len(text), *map(ord, text)])
        if text:
            labels_BF[row, :25] = torch.from_numpy(rng.integers(0, 12, 25).repeat(rng.integers(2, 5, 25))[:25])
    return labels_BF


def pictures(texts: tuple[str, ...], side: int = 8) -> Images:
    """Returns a grey image for each text, that of equal texts the same; none for ""."""
    drawn = [np.random.default_rng([len(text), *map(ord, text)]).integers(0, 256, (1, side, side)) for text in texts]
    present_B = torch.tensor([bool(text) for text in texts])
    pixels_BCHW = torch.from_numpy(np.stack(drawn)).to(torch.uint8)
    return Images(pixels_BCHW * present_B[:, None, None, None], present_B)
