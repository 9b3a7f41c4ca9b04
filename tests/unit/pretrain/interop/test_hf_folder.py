"""Hugging Face folders: no code in them is executed, and damaged or missing files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.frozen_encoders import open_pretrained
from pretrain.interop import hf_folder
from pretrain.interop.init_weights import hugging_face_architecture

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
WEIGHT = "encoder.layers.1.feed_forward.output_dense.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Saves a tiny model with transformers."""
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SIZES))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **fields: Any) -> None:
    """Sets fields in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors; None removes one."""
    weights = load_file(folder / "model.safetensors") | change
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_saved_by_transformers_is_read(folder: Path) -> None:
    layers = open_pretrained(str(folder)).model(torch.randn(1, 4_000), torch.tensor([4_000])).layers
    expected = transformers.Wav2Vec2Model.from_pretrained(folder)(torch.zeros(1, 4_000)).last_hidden_state.shape
    assert layers[-1].shape == expected


@pytest.mark.parametrize("kind", ["wav2vec2", "mymodel"])
def test_code_in_a_checkpoint_is_never_executed(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto_map is ignored for a known model_type; an unknown one is refused without a prompt."""
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass MyConfig: pass\nclass MyModel: pass\n"
    (folder / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.MyConfig", "AutoModel": "evil.MyModel"}
    edit(folder / "config.json", model_type=kind, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("prompted whether to run the code"))
    if kind == "wav2vec2":
        open_pretrained(str(folder))
    else:
        with pytest.raises(ConfigError, match="no model_type=mymodel"):
            open_pretrained(str(folder))
        with pytest.raises(ConfigError, match="model_type=mymodel"):
            hugging_face_architecture(hf_folder.read_config(folder), {}, str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", r"names 'pytorch_model.bin'; only \*.safetensors files in this folder"),
        ("../other/model.safetensors", "only"),
        ("/etc/model.safetensors", "only"),
        ("sub/model.safetensors", "only"),
        (7, "only"),
        ("absent.safetensors", "names absent.safetensors, which is missing"),
    ],
)
def test_an_index_refers_to_safetensors_files_in_its_folder_only(name: Any, words: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "kept.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {WEIGHT: name}}))
    with pytest.raises(ConfigError, match=words):
        open_pretrained(str(folder))


def test_pickled_weights_are_refused_with_a_command_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights_only=True"):
        open_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({WEIGHT: None}, f"{WEIGHT} is missing"),
        ({WEIGHT: torch.zeros(16, 1)}, rf"{WEIGHT} has shape \(16, 1\)"),
        ({WEIGHT: torch.zeros(1)}, rf"{WEIGHT} has shape \(1,\)"),
    ],
)
def test_missing_or_misshapen_encoder_weights_are_refused(
    change: dict[str, torch.Tensor | None], words: str, folder: Path
) -> None:
    change_weights(folder, change)
    with pytest.raises(ConfigError, match=words):
        open_pretrained(str(folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", r"cannot be read as JSON \(must contain a JSON object"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, words: str, folder: Path) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{name}: {words}"):
        open_pretrained(str(folder))


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("config.json", {"model_type": None}, "model_type must be a string"),
        ("config.json", {"model_type": ["wav2vec2"]}, "model_type must be a string"),
        ("config.json", {"model_type": "bert"}, "model_type=bert has no waveform stem"),
        ("config.json", {"hidden_size": 17}, "config.json: transformers cannot build this model"),
        ("config.json", {"conv_stride": [0, 0]}, "config.json: conv_stride must be a list"),
        ("preprocessor_config.json", {"do_normalize": "yes"}, "do_normalize must be true or false, not 'yes'"),
    ],
)
def test_an_invalid_config_field_is_named(file: str, fields: dict[str, Any], words: str, folder: Path) -> None:
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit(folder / file, **fields)
    if fields.get("model_type") == "bert":
        values = json.loads((folder / file).read_text())
        del values["conv_stride"]
        (folder / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        open_pretrained(str(folder))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]])
def test_damaged_weights_are_named(damage: Any, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"model.safetensors: cannot be read"):
        open_pretrained(str(folder))
