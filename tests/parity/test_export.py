"""Exported models give equal features in transformers; weights of released layouts load; others are refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.interop.hf_export import export
from pretrain.interop.init_weights import load_initial
from pretrain.nn.spectral import normalize_wave
from pretrain.objectives.data2vec import Data2Vec
from pretrain.train_module import TrainModule, build_model
from tests.support.hugging_face import negatives_as_theirs
from tests.support.parity_table import Parity

transformers = pytest.importorskip("transformers")
SMALL = {"dim": 48, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_positions_kernel": 16, "conv_positions_groups": 4}
STACK = {"positions": "conv_stack", "conv_positions_kernel": 19, "conv_positions_depth": 3}
LAYER = {"norm": "layer", "bias": True, "normalize": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "wav2vec2 base": ("wav2vec2", {}, {}),
    "wav2vec2 large": ("wav2vec2", LAYER, {"norm": "pre"}),
    "hubert": ("hubert", {}, {}),
    "wavlm": ("wavlm", {}, {"relative_bias": True}),
    "cut front end": ("hubert", {"widths": [16, 32, 24, 20, 28, 32, 12], "channels": 512}, {}),
    "cut front end, layer norms": ("wav2vec2", LAYER | {"widths": [16, 32, 24, 20, 28, 32, 12]}, {"norm": "pre"}),
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


def started(folder: Path, /, *parts: Any, **more: Any) -> TrainModule:
    """Builds a module with different random weights, and loads `init=folder`."""
    described = config(*parts, seed=1, init=str(folder), **more)
    module = build_model(described)
    load_initial(described, module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_exported_features_equal_those_of_the_run(case: str, tmp_path: Path, parity: Parity) -> None:
    described = config(*CASES[case])
    module = build_model(described)
    parity("export: the gate's own comparison, fp64", 1e-5, export(described, module, tmp_path / "out"))
    pretraining = described.objective.name == "wav2vec2"
    kinds = [transformers.AutoModelForPreTraining] if pretraining else []
    for kind in [*kinds, transformers.AutoModel]:
        theirs, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        left = 0 if pretraining and kind is transformers.AutoModel else len(report["unexpected_keys"])
        parity("export: keys missing or unexpected", 0, len(report["missing_keys"]) + left)
    wave_BT = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(1))
    given_BT = normalize_wave(wave_BT, torch.tensor([16_000] * 2)) if described.frontend.normalize else wave_BT
    with torch.no_grad():
        hidden = theirs.eval()(given_BT, output_hidden_states=True).hidden_states
        ours = module.eval().model(wave_BT, torch.tensor([16_000] * 2)).layers
    n = len(hidden) - (described.encoder.norm == "pre")  # transformers returns the last of these before its norm
    error = max(float((a - b).abs().max()) for a, b in zip(ours[:n], hidden[:n], strict=True))
    last = float((theirs(given_BT).last_hidden_state - ours[-1]).detach().abs().max())
    parity("export: every layer of from_pretrained against ours, fp32", 1e-5, max(error, last))
    fresh = started(tmp_path / "out", *CASES[case])
    for name, weight in (module if pretraining else module.model).state_dict().items():
        assert torch.equal((fresh if pretraining else fresh.model).state_dict()[name], weight), name


def test_a_run_whose_blocks_are_all_narrower_is_exported_with_that_width(tmp_path: Path) -> None:
    described = config("hubert", {}, {"widths": [[2, 40], [2, 40]]})
    assert export(described, build_model(described), tmp_path / "out") < 1e-5
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert (model.config.intermediate_size, model.config.num_attention_heads) == (40, 2)
    for widths in ([[2, 40], [2, 24]], [[1, 40], [1, 40]]):
        described = config("hubert", {}, {"widths": widths})
        with pytest.raises(ConfigError, match=r"encoder.widths=.*Hugging Face has no such model"):
            export(described, build_model(described), tmp_path / "other")


def test_the_codebook_sizes_are_exported(tmp_path: Path) -> None:
    """Groups, codes and dimensions differ from transformers' defaults, and no weight is re-initialised."""
    sizes = {"groups": 4, "n_codes": 12, "code_dim": 24, "projection_dim": 20, "negatives": 7}
    described = config("wav2vec2", {}, {}, objective={"name": "wav2vec2", **sizes})
    export(described, build_model(described), tmp_path / "out")
    model, report = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.quantizer.codevectors.shape == (1, 4 * 12, 6)
    assert (model.config.num_codevector_groups, model.config.num_codevectors_per_group) == (4, 12)
    assert (model.project_hid.out_features, model.config.num_negatives) == (20, 7)


@pytest.mark.parametrize("change", [{"n_codes": 160}, {"groups": 4, "n_codes": 160}, {"projection_dim": 64}])
def test_an_objective_of_other_sizes_starts_with_random_weights_and_reports_it(
    change: dict[str, Any], tmp_path: Path
) -> None:
    described = config("wav2vec2", {}, {})
    export(described, build_model(described), tmp_path / "out")
    other = config("wav2vec2", {}, {}, objective={"name": "wav2vec2", **change}, init=str(tmp_path / "out"))
    said: list[str] = []
    taken = load_initial(other, build_model(other), said.append)
    assert taken.objective == ["mask_embedding"]
    assert "quantizer.codevectors" in taken.left
    assert "objective.quantizer.codebook_GVC" in taken.made
    assert "left unused" in said[1]
    assert "new, with random values" in said[2]


def test_both_weight_norm_namings_load_and_unused_weights_are_ignored(tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {})
    module = build_model(described)
    export(described, module, tmp_path / "new")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): weight
        for name, weight in load_file(tmp_path / "new" / "model.safetensors").items()
    }
    assert any(name.endswith("weight_g") for name in old)
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    save_file(old | {"project_hid.weight": torch.zeros(1)}, tmp_path / "old" / "model.safetensors")
    fresh = started(tmp_path / "old", "wav2vec2", {}, {})
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), module.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("case", "frontend", "encoder", "words"),
    [
        (
            "wav2vec2 base",
            {},
            {"ffn_dim": 80},
            "encoder.ffn_dim=80 here and 64 there; to match it, add encoder.ffn_dim=64",
        ),
        ("wav2vec2 base", {}, {"heads": 4}, "encoder.heads=4 here and 2 there"),
        ("wav2vec2 base", {"strides": [5, 2, 2, 2, 2, 2, 1]}, {}, r"add frontend.strides=\[5,2,2,2,2,2,2\]"),
        ("wav2vec2 large", LAYER, {"norm": "post"}, "encoder.norm=post here and pre there"),
        ("wav2vec2 large", LAYER | {"normalize": False}, {"norm": "pre"}, "frontend.normalize=false here and true"),
        ("wavlm", {}, {"relative_bias": True, "relative_max_distance": 400}, "relative_max_distance=400 here and 800"),
        ("wav2vec2 base", {}, {"positions": "rope"}, "encoder.positions=rope here and conv there"),
        ("wav2vec2 base", {"name": "log_mel"}, {}, "to match it, add frontend=waveform_conv"),
    ],
)
def test_another_architecture_is_refused(
    case: str, frontend: dict[str, Any], encoder: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Most of these have equal weight shapes."""
    described = config(*CASES[case])
    export(described, build_model(described), tmp_path / "out")
    parts = {"frontend": {"name": "log_mel"}} if frontend.get("name") else {}
    with pytest.raises(ConfigError, match=words):
        started(tmp_path / "out", "hubert", {} if parts else frontend, encoder, **parts)


def test_unsupported_activations_and_model_types_are_refused(tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {})
    export(described, build_model(described), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    for change, words in (({"hidden_act": "relu"}, "hidden_act=relu"), ({"model_type": "sew"}, "model_type=sew")):
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=words):
            started(tmp_path / "out", "wav2vec2", {}, {})
        file.write_text(json.dumps(values))


def test_sharded_weights_load_and_pickles_must_be_converted(tmp_path: Path) -> None:
    described = config("wav2vec2", {}, {})
    module = build_model(described)
    export(described, module, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    file.unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors; download"):
        started(tmp_path / "out", "wav2vec2", {}, {})
    torch.save(state, tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickle is never opened") as refused:
        started(tmp_path / "out", "wav2vec2", {}, {})
    command = str(refused.value).partition("convert it: ")[2].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["/bin/sh", "-c", command], check=True)
    converted = started(tmp_path / "out", "wav2vec2", {}, {})
    file.unlink()
    names, index = sorted(state), {}
    for part, some in (("a", names[:20]), ("b", names[20:])):
        save_file({name: state[name] for name in some}, tmp_path / "out" / f"model-{part}.safetensors")
        index |= dict.fromkeys(some, f"model-{part}.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for fresh in (converted, started(tmp_path / "out", "wav2vec2", {}, {})):
        assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), module.model.parameters(), strict=True))
    (tmp_path / "out" / "model-b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names model-b\.safetensors, which is missing"):
        started(tmp_path / "out", "wav2vec2", {}, {})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"frontend": {"name": "log_mel"}}, "frontend.name=log_mel"),
        ({"encoder": {"name": "conformer"}}, "encoder.name=conformer"),
        ({"encoder": {"name": "transformer", "positions": "rope"}}, "encoder.positions=rope"),
        ({"encoder": {"name": "transformer", "attention": "chunked"}}, "encoder.attention=chunked"),
    ],
)
def test_models_without_a_hugging_face_equivalent_are_refused(
    values: dict[str, Any], named: str, tmp_path: Path
) -> None:
    described = config("wav2vec2", {}, {}, **values)
    with torch.device("meta"):
        module = build_model(described)
    with pytest.raises(ConfigError, match=named):
        export(described, module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_whose_features_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = config("wav2vec2", {}, {})
    monkeypatch.setattr("pretrain.interop.hf_export.largest_difference", lambda *_: 1.0)
    with pytest.raises(ConfigError, match="differ by"):
        export(described, build_model(described), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_can_be_initialised_from_a_folder(tmp_path: Path) -> None:
    described = config("data2vec", *CASES["data2vec"][1:])
    module = build_model(described)
    export(described, module, tmp_path / "out")
    fresh = started(tmp_path / "out", *CASES["data2vec"])
    assert isinstance(fresh.objective, Data2Vec)
    assert fresh.objective.teacher is not None
    assert torch.equal(fresh.objective.mask_embedding, module.objective.mask_embedding)
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
def test_pretraining_continues_from_transformers_checkpoints(name: str, tmp_path: Path, parity: Parity) -> None:
    """A model saved by transformers initialises ours: equal features, and a finite loss."""
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
    module = started(tmp_path / "theirs", objective, {**frontend, "normalize": False}, encoder)
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


def test_wav2vec2_objective_weights_are_imported(tmp_path: Path, parity: Parity) -> None:
    """With quantizer, projections and mask embedding of Wav2Vec2ForPreTraining the losses are equal."""
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2ForPreTraining(
        transformers.Wav2Vec2Config(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[32] * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    module = started(tmp_path / "theirs", "wav2vec2", {}, {}).eval()
    batch = Batch(0.1 * torch.randn(2, 12_000), torch.tensor([12_000] * 2), ("a", "b"), 0)
    plan = module.prepare(batch, StepContext(0, 0))
    with torch.no_grad():
        expected = theirs(
            batch.wave_BT,
            mask_time_indices=plan.plan.mask.mask_BF,
            sampled_negative_indices=negatives_as_theirs(plan.plan),
        )
        _, metrics = module(batch, plan, plan.counts_K, StepContext(0, 0))
    error = float((metrics["loss/contrastive"][0] - expected.contrastive_loss).abs() / expected.contrastive_loss)
    parity("import: wav2vec 2.0's loss with Wav2Vec2ForPreTraining's own quantiser", 1e-5, error)
    smaller = config("wav2vec2", {}, {}, objective={"name": "wav2vec2", "n_codes": 32}, init=str(tmp_path / "theirs"))
    other = build_model(smaller)
    load_initial(smaller, other)
    assert torch.equal(other.objective.mask_embedding, theirs.wav2vec2.masked_spec_embed)
