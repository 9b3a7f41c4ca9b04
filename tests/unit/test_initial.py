"""A run as the start of another one: the same weights, or a refusal that names one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.schema import ConfigError, dump, load
from pretrain.config import Config
from pretrain.export.initial import load_initial
from pretrain.model import build_model


def config(**encoder: Any) -> Config:
    small = {"name": "transformer", "dim": 16, "layers": 2, "heads": 2, "ffn_dim": 16, "positions": "rope"}
    values = {
        "frontend": {"name": "log_mel"},
        "encoder": small | encoder,
        "objective": {"name": "best_rq", "n_codes": 8},
    }
    return load(Config, values | {"data": {"shards": "none"}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_1")
    (tmp_path / "config.json").write_text(json.dumps(dump(config())))
    save_file(build_model(config()).state_dict(), tmp_path / "checkpoints" / "step_1" / "model.safetensors")
    return tmp_path


def test_the_weights_are_taken_over(run: Path) -> None:
    module, source = build_model(config(dropout=0.3)), build_model(config())
    torch.nn.init.zeros_(next(module.model.encoder.parameters()))
    load_initial(module.model, str(run))
    for name, weight in source.model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("encoder", "words"),
    [({"layers": 3}, "not there in this shape"), ({"layers": 1}, "has no place for"), ({"dim": 32}, "in this shape")],
)
def test_another_model_is_refused(run: Path, encoder: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_initial(build_model(config(**encoder)).model, str(run))
