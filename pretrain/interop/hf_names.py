"""Maps weight names to and from those of Hugging Face's Wav2Vec2, HuBERT, WavLM and Data2VecAudio models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

RENAMES = (
    (r"frontend\.convs\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"frontend\.convs\.(\d+)\.layer_norm\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"frontend\.convs\.0\.norm_(weight|bias)$", r"feature_extractor.conv_layers.0.layer_norm.\1"),
    (r"frontend\.convs\.0\.(weight|bias)$", r"feature_extractor.conv_layers.0.conv.\1"),
    (r"frontend\.norm\.", r"feature_projection.layer_norm."),
    (r"frontend\.linear\.", r"feature_projection.projection."),
    (r"encoder\.positions\.weight_g$", r"encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.positions\.weight_v$", r"encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"encoder\.positions\.bias$", r"encoder.pos_conv_embed.conv.bias"),
    (r"encoder\.positions\.convs\.(\d+)\.", r"encoder.pos_conv_embed.layers.\1.conv."),
    (r"encoder\.relative_bias\.table\.", r"encoder.layers.0.attention.rel_attn_embed."),
    (r"encoder\.blocks\.(\d+)\.attention\.gate\.", r"encoder.layers.\1.attention.gru_rel_pos_linear."),
    (r"encoder\.blocks\.(\d+)\.attention\.gate_scale$", r"encoder.layers.\1.attention.gru_rel_pos_const"),
    (r"encoder\.norm\.", r"encoder.layer_norm."),
    (r"encoder\.blocks\.(\d+)\.attention\.out\.", r"encoder.layers.\1.attention.out_proj."),
    (r"encoder\.blocks\.(\d+)\.attention_norm\.", r"encoder.layers.\1.layer_norm."),
    (r"encoder\.blocks\.(\d+)\.ffn_in\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"encoder\.blocks\.(\d+)\.ffn_out\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (r"encoder\.blocks\.(\d+)\.ffn_norm\.", r"encoder.layers.\1.final_layer_norm."),
)
OBJECTIVE = {
    "project_target": "project_q",
    "project_prediction": "project_hid",
    "quantizer.logits": "quantizer.weight_proj",
}
"""wav2vec 2.0's linear layers -> their names in Wav2Vec2ForPreTraining."""
CODEBOOK, MASK_EMBEDDING = "quantizer.codebook_GVC", "mask_embedding"
QKV = re.compile(r"encoder\.blocks\.(\d+)\.attention\.qkv\.(weight|bias)$")


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a SpeechModel's state to Hugging Face's names. Raises ValueError for a weight without a counterpart."""
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if found := QKV.match(name):
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                renamed[f"encoder.layers.{found[1]}.attention.{part}_proj.{found[2]}"] = third
            continue
        renamed[_rename(name)] = weight
    return renamed


class Found(NamedTuple):
    """weights: by the names in this package.  sources: the names in the Hugging Face state that they came from."""

    weights: dict[str, Tensor]
    sources: set[str]


def from_hugging_face(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Found:
    """Finds the weights named in `ours` in a Hugging Face state, with or without a prefix such as `wav2vec2.`.

    Accepts both naming schemes of weight norm.

    Raises:
        ValueError: weights are missing or have another shape; the message lists all of them.
    """
    prefix = _prefix(state)
    given = {
        name.removeprefix(prefix)
        .replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
        .replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"): name
        for name in state
        if name.startswith(prefix)
    }
    theirs = {name: state[original] for name, original in given.items()}
    used: set[str] = set()
    taken: dict[str, Tensor] = {}
    problems = []
    for name, weight in ours.items():
        found = QKV.match(name)
        sources = (
            [f"encoder.layers.{found[1]}.attention.{p}_proj.{found[2]}" for p in "qkv"] if found else [_rename(name)]
        )
        missing = [source for source in sources if source not in theirs]
        if missing:
            problems.append(f"{', '.join(missing)} is missing")
            continue
        taken[name] = torch.cat([theirs[source] for source in sources]) if found else theirs[sources[0]]
        used |= {given[source] for source in sources}
        if taken[name].shape != weight.shape:
            problems.append(f"{sources[0]} has shape {tuple(taken[name].shape)}, and {name} {tuple(weight.shape)}")
    if problems:
        raise ValueError("the Hugging Face checkpoint does not fit this model: " + "; ".join(problems))
    return Found(taken, used)


def objective_to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of wav2vec 2.0's objective, except the mask embedding, to Wav2Vec2ForPreTraining's names.

    Raises ValueError for a weight without a counterpart.
    """
    renamed = {f"{mine}.{part}": f"{other}.{part}" for mine, other in OBJECTIVE.items() for part in ("weight", "bias")}
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name == CODEBOOK:
            found["quantizer.codevectors"] = weight.flatten(0, 1)[None]
        elif name in renamed:
            found[renamed[name]] = weight
        elif name != MASK_EMBEDDING:
            raise ValueError(f"{name} has no counterpart in Hugging Face's layout")
    return found


def objective_from_hugging_face(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Found:
    """Finds the weights of an objective in a Hugging Face state.

    These are the mask embedding, and wav2vec 2.0's projections and codes if all of them exist with the right shapes.
    """
    pairs = {f"{mine}.{part}": f"{other}.{part}" for mine, other in OBJECTIVE.items() for part in ("weight", "bias")}
    pairs |= {CODEBOOK: "quantizer.codevectors"}
    sources = {name: pairs[name] for name in ours if pairs.get(name) in state}
    wanted = [name for name in ours if name != MASK_EMBEDDING]
    # theirs is (1, groups · codes, dimensions of a group)
    shapes = {name: weight.shape for name, weight in ours.items()}
    if CODEBOOK in ours:
        shapes[CODEBOOK] = torch.Size((1, ours[CODEBOOK].shape[:2].numel(), ours[CODEBOOK].shape[2]))
    same = [name for name in sources if state[sources[name]].shape == shapes[name]]
    found = {name: state[sources[name]].reshape(ours[name].shape) for name in same} if same == wanted else {}
    used = {sources[name] for name in found}
    embedding = f"{_prefix(state)}masked_spec_embed"
    if embedding in state and MASK_EMBEDDING in ours and state[embedding].shape == ours[MASK_EMBEDDING].shape:
        found[MASK_EMBEDDING] = state[embedding]
        used.add(embedding)
    return Found(found, used)


def _prefix(state: Mapping[str, Tensor]) -> str:
    """Returns the prefix of the base model's weights in a model with a head, such as `wav2vec2.`; else ""."""
    last = "encoder.layer_norm.weight"
    return next((name.removesuffix(last) for name in state if name.endswith(last)), "")


def _rename(name: str) -> str:
    for ours, theirs in RENAMES:
        renamed, times = re.subn("^" + ours, theirs, name)
        if times:
            return renamed
    raise ValueError(f"{name} has no counterpart in Hugging Face's layout")
