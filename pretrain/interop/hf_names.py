"""Weights between our names and those of Hugging Face's Wav2Vec2, HuBERT, WavLM and Data2VecAudio models."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
"""wav2vec 2.0's linear layers, and what Wav2Vec2ForPreTraining calls them."""
QKV = re.compile(r"encoder\.blocks\.(\d+)\.attention\.qkv\.(weight|bias)$")


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SpeechModel's state under Hugging Face's names. Raises ValueError for a weight without a counterpart."""
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if found := QKV.match(name):
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                renamed[f"encoder.layers.{found[1]}.attention.{part}_proj.{found[2]}"] = third
            continue
        renamed[_rename(name)] = weight
    return renamed


def from_hugging_face(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights named in `ours`, taken from a Hugging Face state (with or without a prefix such as `wav2vec2.`).

    Understands both namings of weight norm. Raises ValueError naming every weight that is missing or of another shape.
    """
    prefix = _prefix(state)
    theirs = {
        name.removeprefix(prefix)
        .replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
        .replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"): weight
        for name, weight in state.items()
        if name.startswith(prefix)
    }
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
        if taken[name].shape != weight.shape:
            problems.append(f"{sources[0]} has shape {tuple(taken[name].shape)}, and {name} {tuple(weight.shape)}")
    if problems:
        raise ValueError("the Hugging Face checkpoint does not fit this model: " + "; ".join(problems))
    return taken


def objective_from_hugging_face(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an objective that a Hugging Face state has: its mask embedding; wav2vec 2.0's projections and
    codes, if all of them are of its shapes."""
    found = {
        f"{mine}.{part}": state[f"{other}.{part}"]
        for mine, other in OBJECTIVE.items()
        for part in ("weight", "bias")
        if f"{other}.{part}" in state
    }
    codes = ours.get("quantizer.codebook_GVC")
    if codes is not None and "quantizer.codevectors" in state:
        codes_GVC = state["quantizer.codevectors"]
        if codes_GVC.numel() == codes.numel():
            found["quantizer.codebook_GVC"] = codes_GVC.reshape(codes.shape)
    wanted = {name: weight.shape for name, weight in ours.items() if name.partition(".")[0] != "mask_embedding"}
    if {name: weight.shape for name, weight in found.items()} != wanted:
        found = {}
    embedding, own = state.get(f"{_prefix(state)}masked_spec_embed"), ours.get("mask_embedding")
    if embedding is not None and own is not None and embedding.shape == own.shape:
        found["mask_embedding"] = embedding
    return found


def _prefix(state: Mapping[str, Tensor]) -> str:
    """What stands before a base model's names in one with a head, such as `wav2vec2.`."""
    last = "encoder.layer_norm.weight"
    return next((name.removesuffix(last) for name in state if name.endswith(last)), "")


def _rename(name: str) -> str:
    for ours, theirs in RENAMES:
        renamed, times = re.subn("^" + ours, theirs, name)
        if times:
            return renamed
    raise ValueError(f"{name} has no counterpart in Hugging Face's layout")
