"""Every hidden state of stem and encoder against transformers (≤ 1e-5 in fp32, ≤ 1e-10 in fp64)."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.core.schema import load
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.runs.metadata import run_config
from pretrain.train_module import build_model
from tests.support.hugging_face import copy_weights, hugging_face_config, our_model, ragged_batch, randomize
from tests.support.parity_table import Parity

transformers = pytest.importorskip("transformers")


KINDS = {
    "Wav2Vec2": ({}, {}),
    "Hubert": ({}, {}),
    "WavLM": (
        {"num_buckets": 32, "max_bucket_distance": 40},
        {"relative_bias": True, "relative_buckets": 32, "relative_max_distance": 40},
    ),
    "Data2VecAudio": (
        {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 19},
        {"positions": "conv_stack", "conv_positions_depth": 3, "conv_positions_kernel": 19},
    ),
}
"""Fields of each architecture beyond the common sizes: of transformers' config and of ours."""
CASES = [
    (kind, norm, pre)
    for kind in KINDS
    for norm in ("group", "layer")
    for pre in (False, True)
    if kind != "Data2VecAudio" or (norm == "layer" and not pre)  # it has only this variant
]


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("kind", "norm", "pre"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_hidden_states_equal_those_of_transformers(
    kind: str,
    norm: str,
    pre: bool,
    ragged: bool,
    dtype: torch.dtype,
    tolerance: float,
    parity: Parity,
) -> None:
    torch.manual_seed(0)
    more, encoder = KINDS[kind]
    config = hugging_face_config(getattr(transformers, f"{kind}Config"), norm, pre, **more)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    randomize(theirs)
    ours = our_model(norm, pre, **encoder).eval()
    copy_weights(theirs, ours)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    wave_BT, lengths_B = ragged_batch(ragged)
    attention_mask = (torch.arange(wave_BT.shape[1])[None] < lengths_B[:, None]).long() if ragged else None
    with torch.no_grad():
        expected = theirs(wave_BT.to(dtype), attention_mask=attention_mask, output_hidden_states=True)
        found = ours(wave_BT.to(dtype), lengths_B)
    valid_BF = found.final.valid_BF()
    hidden = [*expected.hidden_states[:-1], expected.last_hidden_state]
    assert len(hidden) == len(found.layers)
    worst = max(float((a - b)[valid_BF].abs().max()) for a, b in zip(found.layers, hidden, strict=True))
    parity(f"{kind}Model hidden states, {str(dtype)[6:]}", tolerance, worst)


LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
}
SHIPPED = {
    "wav2vec2_base": ("Wav2Vec2", {}),
    "wav2vec2_large": ("Wav2Vec2", LARGE),
    "hubert_base": ("Hubert", {}),
    "wavlm_base": ("WavLM", {}),
    "data2vec_base": ("Data2VecAudio", {}),
}


@pytest.mark.parametrize("experiment", SHIPPED)
def test_shipped_models_have_as_many_parameters_as_those_of_transformers(experiment: str, parity: Parity) -> None:
    """Transformers' defaults are the released BASE models, which include our objective's mask embedding."""
    kind, more = SHIPPED[experiment]
    values = compose("pretrain", [f"experiment={experiment}", "data.shards=nowhere"])
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**more))
        module = build_model(run_config(load(PretrainJob, values)))
    ours = sum(weight.numel() for weight in module.model.parameters()) + module.objective.mask_embedding.numel()
    expected = sum(weight.numel() for weight in theirs.parameters())
    parity("parameters of shipped models against transformers': how many more or fewer", 0, abs(ours - expected))
