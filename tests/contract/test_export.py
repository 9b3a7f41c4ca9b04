"""Contract of every front end and encoder: the graph that ONNX is written from exists, or the refusal says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.interop.graph_export import Features, export_graph, largest_difference, program
from pretrain.train_module import build_model
from tests.support.contract_cases import ENCODERS, small

CONF = Path(__file__).resolve().parents[2] / "conf"
FRONT_ENDS: dict[str, dict[str, Any]] = {
    "waveform_conv": {"name": "waveform_conv", "channels": 16},
    "waveform_conv, layer norm": {"name": "waveform_conv", "channels": 16, "norm": "layer", "normalize": True},
    **{f"log_mel {n}": {"name": "log_mel", "subsampling": n} for n in (1, 2, 4, 8)},
    **{f"multiscale {n}": {"name": "multiscale", "wave_channels": 16, "subsampling": n} for n in (2, 4, 8)},
}


def shipped(path: Path) -> dict[str, Any]:
    """Returns a shipped encoder's fields with small sizes; options stay as they are."""
    fields = yaml.safe_load(path.read_text())
    fields |= {key: value for key, value in small("encoders", fields["name"]).items() if key != "layers"}
    return fields | {"layers": 3, "half_rate_blocks": min(1, fields.get("half_rate_blocks", 0))}


SHIPPED = {path.stem: shipped(path) for path in sorted((CONF / "encoder").glob("*.yaml"))}
WIDE = {"layers": 3, "widths": [[1, 48], [2, 64], [3, 16]]}
QUICK: list[tuple[str, dict[str, Any]]] = [
    *(("log_mel 2", small("encoders", name) | WIDE) for name in ENCODERS),
    ("multiscale 4", small("encoders", "conformer") | {"layers": 1}),
    ("waveform_conv", small("encoders", "transformer") | {"layers": 1}),
]
SLOW = [(frontend, encoder) for frontend in FRONT_ENDS for encoder in SHIPPED]


def config_of(frontend: str, encoder: dict[str, Any]) -> Config:
    """Returns the config of a model."""
    values = {"data": {"shards": "none"}, "objective": {"name": "hubert"}, "frontend": FRONT_ENDS[frontend]}
    return load(Config, values | {"encoder": encoder})


def check(frontend: str, encoder: dict[str, Any]) -> None:
    """Asserts that the traced graph gives the model's features for other batch sizes and lengths."""
    model = build_model(config_of(frontend, encoder)).model.eval()
    features = Features(model, model.shape.n_layers)
    with torch.no_grad():
        graph = program(features).module()
    assert largest_difference(features, graph) <= 1e-5


@pytest.mark.parametrize(("frontend", "encoder"), QUICK)
def test_every_front_end_and_encoder_gives_a_graph_for_all_sizes(frontend: str, encoder: dict[str, Any]) -> None:
    check(frontend, encoder)


@pytest.mark.slow
@pytest.mark.parametrize(("frontend", "encoder"), SLOW)
def test_every_shipped_encoder_exports_behind_every_front_end(frontend: str, encoder: str) -> None:
    check(frontend, SHIPPED[encoder])


ONNX = [*(("log_mel 2", encoder) for encoder in SHIPPED), *((frontend, "transformer_tiny") for frontend in FRONT_ENDS)]


@pytest.mark.slow
@pytest.mark.parametrize(("frontend", "encoder"), ONNX)
def test_every_shipped_encoder_and_every_front_end_run_in_onnxruntime(
    frontend: str, encoder: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    config = config_of(frontend, SHIPPED[encoder])
    assert export_graph(config, build_model(config).model, tmp_path / "out", "onnx") <= 1e-4


def test_every_plugin_has_a_case() -> None:
    from pretrain import registry

    assert {fields["name"] for fields in FRONT_ENDS.values()} == {*registry.names("frontends")}
    assert {fields["name"] for fields in SHIPPED.values()} == {*ENCODERS}


def test_chunked_attention_says_why_it_has_no_graph(tmp_path: Path) -> None:
    encoder = SHIPPED["transformer_streaming"] | {"chunk_frames": [4], "left_chunks": [1]}
    config = config_of("log_mel 4", encoder)
    with pytest.raises(ConfigError, match=r"encoder.attention=chunked"):
        export_graph(config, build_model(config).model, tmp_path / "out", "torchscript")
