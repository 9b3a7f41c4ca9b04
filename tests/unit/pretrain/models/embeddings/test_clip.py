"""The frozen image encoder of a CLIP or SigLIP folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import IMAGE, Batch, Images
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import TrainModule
from tests.support.contract_cases import batch, labelled, make

transformers = pytest.importorskip("transformers")
CTX = StepContext(seed=3, step=5)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("image") / "model", request.param, seed=0)


def written(path: Path, name: str, seed: int) -> Path:
    torch.manual_seed(seed)
    text = SIZES | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    more = {"projection_dim": 12} if name == "CLIP" else {}
    settings = {"text_config": text, "vision_config": SIZES | {"image_size": 8, "patch_size": 4}, **more}
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(path)
    return path


def module_of(folder: Path, size: int = 8) -> TrainModule:
    towers = {"image": {"embedding": {"name": "clip", "folder": str(folder), "size": size}}}
    return make("none", heads={"joint": {"name": "joint_embedding", "embedding_dim": 8, "towers": towers}})


def pictured(size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    return dataclasses.replace(batch((0.5, 0.4)), images={IMAGE: Images(pixels_BCHW, torch.ones(2, dtype=torch.bool))})


def train_once(module: TrainModule, data: Batch) -> dict[str, Any]:
    plan = module.prepare(data, CTX)
    loss, metrics = module(data, plan, plan.counts_K, CTX)
    loss.backward()
    assert torch.isfinite(loss)
    return metrics


def test_frames_are_the_embeddings_of_transformers(folder: Path) -> None:
    embedding = module_of(folder).heads["joint"].towers["image"].embedding
    data = pictured()
    frames = embedding(data)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    siglip = "siglip" in json.loads((folder / "config.json").read_text())["model_type"]
    mean, std = ([0.5] * 3, [0.5] * 3) if siglip else (None, None)
    processor = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, **({"image_mean": mean, "image_std": std} if siglip else {})
    )
    inputs = processor(list(data.images[IMAGE].pixels_BCHW), return_tensors="pt")
    with torch.no_grad():
        out = model.get_image_features(**inputs)
    expected = out if isinstance(out, torch.Tensor) else out.pooler_output
    torch.testing.assert_close(frames.x_BFD[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert frames.lengths_B.tolist() == [1, 1]


def test_it_is_frozen_and_no_part_of_the_checkpoint_but_its_checksum(folder: Path) -> None:
    module = module_of(folder)
    assert int(train_once(module, pictured())["loss/joint"][1]) == 2
    names = [name for name in module.state_dict() if "towers.image" in name]
    assert sorted(names) == [
        "heads.joint.towers.image.embedding.sha256",
        "heads.joint.towers.image.pool.project.bias",
        "heads.joint.towers.image.pool.project.weight",
    ]
    assert module.heads["joint"].towers["image"].pool.project.weight.grad.abs().max() > 0


def test_other_weights_than_those_of_the_start_are_refused(folder: Path, tmp_path: Path) -> None:
    module = module_of(folder)
    train_once(module, pictured())
    name = "Siglip" if "siglip" in (folder / "config.json").read_text() else "CLIP"
    other = module_of(written(tmp_path / "other", name, seed=1))
    other.load_state_dict(module.state_dict())
    with pytest.raises(ConfigError, match="and this run began with"):
        train_once(other, pictured())


def test_images_of_another_size_are_scaled(folder: Path) -> None:
    train_once(module_of(folder, size=20), pictured(20))


def test_rows_without_an_image_have_no_frame(folder: Path) -> None:
    embedding = module_of(folder).heads["joint"].towers["image"].embedding
    frames = embedding(dataclasses.replace(labelled(batch((0.5, 0.4))), images={}))
    assert frames.lengths_B.tolist() == [0, 0]
    assert float(frames.x_BFD.abs().max()) == 0.0


def test_folders_that_are_no_safetensors_of_clip_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a folder with config\.json"):
        module_of(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"no model.safetensors; other formats"):
        module_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ConfigError, match=r"not a folder with config\.json of one of clip"):
        module_of(tmp_path)


def test_a_tower_with_an_encoder_after_it_is_refused(folder: Path) -> None:
    tower = {"embedding": {"name": "clip", "folder": str(folder)}, "encoder": {"name": "transformer"}}
    with pytest.raises(ConfigError, match="leave out the encoder"):
        make("none", heads={"joint": {"name": "joint_embedding", "towers": {"image": tower}}})
