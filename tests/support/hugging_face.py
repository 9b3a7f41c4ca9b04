"""Builds one architecture both in auricle and in transformers, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.interfaces.models import SpeechModel
from pretrain.interop.hf_names import from_hugging_face
from pretrain.models.encoders import transformer
from pretrain.models.frontends import waveform_conv
from pretrain.objectives import wav2vec2

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": [64] * 7,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 4,
}


def hugging_face_config(kind: type[Any], norm: str, pre: bool, **more: Any) -> Any:
    """Returns a small config of a transformers model: `norm` of the stem, `pre`-norm or post-norm blocks."""
    return kind(
        feat_extract_norm=norm,
        conv_bias=norm == "layer",
        do_stable_layer_norm=pre,
        attn_implementation="eager",
        layerdrop=0.0,
        **(SIZES | more),
    )


def our_model(norm: Any, pre: bool, dropout: float = 0.0, **encoder: Any) -> SpeechModel:
    """Returns the same architecture of auricle, before the weights are copied."""
    frontend_config = waveform_conv.Config(channels=64, norm=norm, bias=norm == "layer", dropout=dropout)
    sizes: dict[str, Any] = {"dim": 96, "layers": 3, "heads": 4, "ffn_dim": 192, "layer_drop": 0.0}
    sizes |= {"conv_positions_kernel": 32, "conv_positions_groups": 4}
    sizes |= {"norm": "pre" if pre else "post", "dropout": dropout, "attention_dropout": dropout}
    encoder_config = transformer.Config(**sizes | encoder)
    return SpeechModel(waveform_conv.build(frontend_config, 96), transformer.build(encoder_config))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws all weights, so that norms and biases do not keep their initial 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)


def copy_weights(theirs: torch.nn.Module, ours: SpeechModel) -> None:
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), ours.state_dict()).weights)


def ragged_batch(ragged: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (wave_BT, lengths_B) of three rows."""
    wave_BT = torch.randn(3, 16_000, generator=torch.Generator().manual_seed(seed))
    lengths_B = torch.tensor([16_000, 12_345, 9_000] if ragged else [16_000] * 3)
    return wave_BT * (torch.arange(16_000)[None] < lengths_B[:, None]), lengths_B


def negatives_as_theirs(plan: wav2vec2.ContrastivePlan) -> Tensor:
    """Returns (B, F, K) indices into B·F, the form that transformers takes."""
    B, F = plan.mask.mask_BF.shape
    frames_BM = plan.mask.flat_N[plan.mask.row_BM]
    out = torch.zeros(B, F, plan.negatives_BMK.shape[2], dtype=torch.int64)
    for row in range(B):
        valid = plan.mask.valid_BM[row]
        out[row, frames_BM[row, valid] - row * F] = frames_BM[row][plan.negatives_BMK[row, valid]]
    return out
