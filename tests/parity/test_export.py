"""Export → from_pretrained → the same features; weights of released layouts as a start; clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.schema import ConfigError, load
from data_pipeline.types import Batch
from pretrain.config import Config
from pretrain.export.hugging_face import export, load_hugging_face
from pretrain.export.initial import load_initial
from pretrain.model import build_model
from pretrain.nn.spectral import normalize_wave
from pretrain.types import StepContext
from tests.parity_table import Parity

transformers = pytest.importorskip("transformers")
SMALL = {"dim": 48, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_positions_kernel": 16, "conv_positions_groups": 4}
STACK = {"positions": "conv_stack", "conv_positions_kernel": 19, "conv_positions_depth": 3}
LAYER = {"norm": "layer", "bias": True, "normalize": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "wav2vec2 base": ("wav2vec2", {}, {}),
    "wav2vec2 large": ("wav2vec2", LAYER, {"norm": "pre"}),
    "hubert": ("hubert", {}, {}),
    "wavlm": ("wavlm", {}, {"relative_bias": True}),
    "data2vec": ("data2vec", {"norm": "layer", "normalize": True}, STACK),
}


def config(objective: str, frontend: dict[str, Any], encoder: dict[str, Any], /, **more: Any) -> Config:
    values = {
        "data": {"shards": "none"},
        "objective": {"name": objective},
        "frontend": {"name": "waveform_conv", "channels": 32} | frontend,
        "encoder": {"name": "transformer"} | SMALL | encoder,
    }
    return load(Config, values | more)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path, parity: Parity) -> None:
    described = config(*CASES[case])
    module = build_model(described)
    parity("export: the gate's own comparison, fp64", 1e-5, export(described, module, tmp_path / "out"))
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    parity("export: keys missing or unexpected", 0, len(report["missing_keys"]) + len(report["unexpected_keys"]))
    wave_BT = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(1))
    given_BT = normalize_wave(wave_BT, torch.tensor([16_000] * 2)) if described.frontend.normalize else wave_BT
    with torch.no_grad():
        hidden = theirs.eval()(given_BT, output_hidden_states=True).hidden_states
        ours = module.eval().model(wave_BT, torch.tensor([16_000] * 2)).layers
    n = len(hidden) - (described.encoder.norm == "pre")  # theirs gives the last of these before its norm
    error = max(float((a - b).abs().max()) for a, b in zip(ours[:n], hidden[:n], strict=True))
    last = float((theirs(given_BT).last_hidden_state - ours[-1]).detach().abs().max())
    parity("export: every layer of from_pretrained against ours, fp32", 1e-5, max(error, last))
    fresh = build_model(config(*CASES[case], seed=1))
    load_hugging_face(fresh.model, tmp_path / "out")
    for name, weight in module.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], weight), name


def test_both_namings_of_weight_norm_and_prefixes_load(tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {})
    module = build_model(described)
    export(described, module, tmp_path / "new")
    old = {
        "wav2vec2."
        + name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): weight
        for name, weight in load_file(tmp_path / "new" / "model.safetensors").items()
    }
    assert any(name.endswith("weight_g") for name in old)
    (tmp_path / "old").mkdir()
    save_file(old | {"project_hid.weight": torch.zeros(1)}, tmp_path / "old" / "model.safetensors")
    fresh = build_model(config("wav2vec2", {}, {}, seed=1))
    load_hugging_face(fresh.model, tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), module.model.parameters(), strict=True))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {})
    export(described, build_model(described), tmp_path / "out")
    wider = build_model(config("wav2vec2", {}, {"ffn_dim": 80}))
    with pytest.raises(ConfigError, match=r"intermediate_dense\.weight has shape \(64, 48\)"):
        load_hugging_face(wider.model, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load_hugging_face(wider.model, tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"frontend": {"name": "log_mel"}}, "frontend.name=log_mel"),
        ({"encoder": {"name": "conformer"}}, "encoder.name=conformer"),
        ({"encoder": {"name": "transformer", "positions": "rope"}}, "encoder.positions=rope"),
        ({"encoder": {"name": "transformer", "attention": "chunked"}}, "encoder.attention=chunked"),
    ],
)
def test_refusals(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {}, **values)
    with torch.device("meta"):
        module = build_model(described)
    with pytest.raises(ConfigError, match=named):
        export(described, module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_gate_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = config("wav2vec2", {}, {})
    monkeypatch.setattr("pretrain.export.hugging_face.gate", lambda *_: 1.0)
    with pytest.raises(ConfigError, match="differ by"):
        export(described, build_model(described), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_can_start_from_a_folder(tmp_path: Path) -> None:
    described = config("data2vec", *CASES["data2vec"][1:])
    module = build_model(described)
    export(described, module, tmp_path / "out")
    fresh = build_model(config("data2vec", *CASES["data2vec"][1:], seed=1))
    load_initial(fresh.model, str(tmp_path / "out"))
    fresh.objective.attach(fresh.model)
    for ours, theirs in zip(fresh.objective.teacher.copy.parameters(), module.model.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


LAYOUTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Wav2Vec2ForPreTraining": ("Wav2Vec2", "wav2vec2", {}, {}),
    "Wav2Vec2ForCTC": ("Wav2Vec2", "wav2vec2", LAYER, {"norm": "pre"}),
    "HubertForCTC": ("Hubert", "hubert", {}, {}),
    "WavLMModel": ("WavLM", "wavlm", {}, {"relative_bias": True}),
    "Data2VecAudioForCTC": ("Data2VecAudio", "data2vec", {"norm": "layer"}, STACK),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_continued_pretraining_from_their_own_checkpoints(name: str, tmp_path: Path, parity: Parity) -> None:
    """What transformers writes is a start for ours: the same features, and a loss that can be trained."""
    torch.manual_seed(0)
    kind, objective, frontend, encoder = LAYOUTS[name]
    stack, large = "positions" in encoder, encoder.get("norm") == "pre"
    theirs_config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[32] * 7,
        feat_extract_norm=frontend.get("norm", "group"), conv_bias=frontend.get("bias", False),
        do_stable_layer_norm=large, num_conv_pos_embeddings=3 if stack else 16, num_conv_pos_embedding_groups=4,
        **({"max_bucket_distance": 800} if kind == "WavLM" else {}),
    )  # fmt: skip
    theirs = getattr(transformers, name)(theirs_config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    module = build_model(config(objective, {**frontend, "normalize": False}, encoder))
    load_initial(module.model, str(tmp_path / "theirs"))
    module.objective.attach(module.model)
    wave_BT = 0.1 * torch.randn(2, 12_000)
    with torch.no_grad():
        expected = getattr(theirs, theirs.base_model_prefix, theirs)(wave_BT).last_hidden_state
        found = module.eval().model(wave_BT, torch.tensor([12_000] * 2)).final.x_BFD
    parity("import: features of a transformers checkpoint against ours", 1e-5, float((found - expected).abs().max()))
    batch = Batch(wave_BT, torch.tensor([12_000] * 2), ("a", "b"), 0)
    plan = module.train().prepare(batch, StepContext(0, 0))
    loss, _ = module(batch, plan, plan.counts_K, StepContext(0, 0))
    loss.backward()
    assert torch.isfinite(loss)
