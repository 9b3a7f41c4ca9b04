"""TorchScript and ONNX exports give equal features for lengths and batch sizes not seen during tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from pretrain.compression.attention_fusion import fuse_attention
from pretrain.config import Config
from pretrain.interop import graph_export
from pretrain.train_module import build_model
from tests.support.parity_table import Parity

SMALL = {"dim": 48, "layers": 2, "heads": 2, "ffn_dim": 64}
POSITIONS = {"conv_positions_kernel": 16, "conv_positions_groups": 4}
STEM = {"name": "waveform_conv", "channels": 32}
TRANSFORMER = {"name": "transformer"} | SMALL
ROPE = TRANSFORMER | {"norm": "pre", "positions": "rope"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wav2vec2 base": (STEM, TRANSFORMER | POSITIONS),
    "wav2vec2 large": (STEM | {"norm": "layer", "normalize": True}, TRANSFORMER | POSITIONS | {"norm": "pre"}),
    "wavlm": (STEM, TRANSFORMER | POSITIONS | {"relative_bias": True}),
    "data2vec": (
        STEM | {"norm": "layer"},
        TRANSFORMER | POSITIONS | {"positions": "conv_stack", "conv_positions_kernel": 19},
    ),
    "efficient": ({"name": "log_mel", "normalize": "fixed"}, ROPE | {"attention": "chunked"}),
    "conformer": ({"name": "log_mel"}, {"name": "conformer"} | SMALL),
}

ONE = "efficient"
"""The case that CI also exports to ONNX."""


def made(frontend: dict[str, Any], encoder: dict[str, Any]) -> tuple[Config, Any]:
    values = {"data": {"shards": "none"}, "objective": {"name": "hubert"}, "frontend": frontend, "encoder": encoder}
    config = load(Config, values)
    return config, build_model(config).model


@pytest.mark.parametrize("case", CASES)
def test_torchscript_features_equal_those_of_the_model(case: str, tmp_path: Path, parity: Parity) -> None:
    config, model = made(*CASES[case])
    error = graph_export.export_graph(config, model, tmp_path / "out", "torchscript")
    parity("TorchScript: features, as a share of the largest", 1e-5, error)
    wave_BT = torch.randn(1, 20_000)
    expected = model.eval()(wave_BT, torch.tensor([20_000])).final.x_BFD
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "out" / "model.ts"))(wave_BT), expected)


def test_a_model_trained_on_packed_rows_is_exported(tmp_path: Path) -> None:
    _, model = made(*CASES["wav2vec2 base"])
    model.frontend.packed = model.encoder.packed = True
    assert graph_export.export_graph(made(*CASES["wav2vec2 base"])[0], model, tmp_path / "out", "torchscript") <= 1e-5
    assert model.encoder.packed, "the exporter changes a copy only"


@pytest.mark.parametrize("case", [ONE, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != ONE)])
def test_onnx_features_equal_those_of_the_model(case: str, tmp_path: Path, parity: Parity) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    error = graph_export.export_graph(*made(*CASES[case]), tmp_path / "out", "onnx")
    parity("ONNX: features, as a share of the largest", 1e-4, error)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "features.json"}
    graph, wave_BT = onnx.load(tmp_path / "out" / "model.onnx"), 0.1 * torch.randn(2, 30_000)
    assert fuse_attention(graph) == (0 if case == "wavlm" else 2)
    onnx.save(graph, tmp_path / "fused.onnx")
    exact, fused = (graph_export.open_graph(tmp_path / name)(wave_BT) for name in ("out/model.onnx", "fused.onnx"))
    parity(
        "fused attention: features, as a share of the largest", 1e-5, (fused - exact).abs().max() / exact.abs().max()
    )


def test_an_intermediate_layer_is_exported(tmp_path: Path) -> None:
    config, model = made(*CASES["efficient"])
    graph_export.export_graph(config, model, tmp_path / "out", "torchscript", layer=1)
    wave_BT = torch.randn(2, 17_000)
    expected = model.eval()(wave_BT, torch.tensor([17_000] * 2)).layers[1]
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "out" / "model.ts"))(wave_BT), expected)
    with pytest.raises(ConfigError, match="has the layers 0 to 2"):
        graph_export.export_graph(config, model, tmp_path / "other", "torchscript", layer=3)


def test_an_unsupported_attention_pattern_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    chunked = ROPE | {"attention": "chunked", "chunk_frames": [4], "left_chunks": 1}
    with pytest.raises(ConfigError, match=r"attention=chunked: the exported .* differ by|does not run on"):
        graph_export.export_graph(*made({"name": "log_mel"}, chunked), tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_features_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_export, "largest_difference", lambda *_: 1e-3)
    with pytest.raises(ConfigError, match=r"differ by 1\.0e-03"):
        graph_export.export_graph(*made(*CASES["efficient"]), tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_onnx_export_without_its_packages_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        graph_export.export_graph(*made(*CASES["efficient"]), tmp_path / "out", "onnx")
