"""INT8 graphs: integer arithmetic to the bit, the right products, calibration, and the comparison before writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from launch.main import main
from launch.workflows import quantized_export
from pretrain.compression.quantization import Lost, lost, quantize, require_accurate
from pretrain.evaluate.graph_encoder import open_graph_encoder
from pretrain.nn.block_stack import BlockStack
from tests.support.tiny_shards import sounds, wave_of, write_shards
from tests.support.tones import write_tones
from tests.support.training import save

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
RUN = "{}/run/checkpoints/step_00000002"
RNG = np.random.default_rng(0)


def product(weight: np.ndarray, bias: np.ndarray) -> Any:
    """Returns a graph: wave · weight + bias."""
    from onnx import TensorProto, helper, numpy_helper

    given = helper.make_tensor_value_info("wave", TensorProto.FLOAT, [None, weight.shape[0]])
    made = helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, weight.shape[1]])
    nodes = [
        helper.make_node("MatMul", ["wave", "w"], ["y"], "product"),
        helper.make_node("Add", ["y", "b"], ["features"], "sum"),
    ]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph(nodes, "g", [given], [made], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_a_dynamic_product_is_integer_arithmetic_to_the_bit(tmp_path: Path, reduce_range: bool) -> None:
    """NumPy's twin: ranges of the call, rounding half to even, sums in int32, one scale per output channel."""
    weight, bias = RNG.standard_normal((96, 40)).astype(np.float32), RNG.standard_normal(40).astype(np.float32)
    onnx.save(product(weight, bias), tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", ["product"], "dynamic", [], reduce_range)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    x = RNG.standard_normal((7, 96)).astype(np.float32)
    limit = 64 if reduce_range else 127
    weight_scale = stored["w_scale"].reshape(-1)
    rounded = np.clip(np.rint(weight / weight_scale), -limit, limit).astype(np.int32)
    assert np.array_equal(stored["w_quantized"], rounded)
    assert np.abs(rounded).max() == limit
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(np.float32(-low / scale)), 0, 255)
    steps = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int32) - int(zero)
    expected = (steps @ rounded).astype(np.float32) * (scale * weight_scale).astype(np.float32) + bias
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = ort.InferenceSession(str(tmp_path / "int8.onnx"), options).run(None, {"wave": x})[0]
    assert np.array_equal(exact, expected)
    fused = ort.InferenceSession(str(tmp_path / "int8.onnx")).run(None, {"wave": x})[0]
    np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-4)
    error = np.abs(expected - (x @ weight + bias)).max() / np.abs(x @ weight).max()
    assert 1e-4 < error < 0.03


def test_static_ranges_are_those_of_the_given_audio(tmp_path: Path) -> None:
    weight = RNG.standard_normal((96, 40)).astype(np.float32)
    onnx.save(product(weight, np.zeros(40, np.float32)), tmp_path / "fp32.onnx")
    waves = [torch.linspace(-1.0, 3.0, 96), torch.linspace(-0.5, 1.0, 96)]
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", ["product"], "static", waves, False)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert float(stored["wave_scale"]) == pytest.approx(4 / 255, rel=1e-5)
    assert int(stored["wave_zero_point"]) == 64
    run = ort.InferenceSession(str(tmp_path / "int8.onnx"))
    inside, outside = ({"wave": np.full((1, 96), level, np.float32)} for level in (2.9, 30.0))
    np.testing.assert_allclose(run.run(None, inside)[0][0], 2.9 * weight.sum(0), atol=0.5)
    assert np.abs(run.run(None, outside)[0]).max() < np.abs(4 * weight.sum(0)).max(), "values beyond are clipped"
    with pytest.raises(ConfigError, match="--int8 static needs audio"):
        quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", ["product"], "static", [], False)


def test_an_int8_export_quantises_linear_layers_only_and_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.checkpointing.locate import find_checkpoint
    from pretrain.checkpointing.weights import load_checkpoint

    shards = str(write_shards(tmp_path / "shards", [sounds([2.0] * 6)]))
    sizes = {"layers": 1, "dim": 32, "heads": 2, "ffn_dim": 64}
    fixed = {"name": "log_mel", "normalize": "fixed"}  # statistics of an utterance would take a tone's pitch away
    save(tmp_path / "run", 2, frontend=fixed, encoder={"name": "transformer", **sizes})
    traced = quantized_export.export_graph

    def once(config: Any, model: Any, folder: Path, *rest: Any) -> float:
        """Traces the run once; the second export below copies the first graph."""
        kept = tmp_path / "kept"
        if not kept.exists():
            traced(config, model, kept, *rest)
        shutil.copytree(kept, folder)
        return 0.0

    monkeypatch.setattr(quantized_export, "export_graph", once)
    line = ["export", RUN.format(tmp_path), str(tmp_path / "out"), "--to", "onnx", "--int8", "static"]
    tones = write_tones(tmp_path / "tones")
    (tones / "phones").mkdir()
    shutil.copy(tones / "phones.tsv", tones / "phones" / "auto_pocketsphinx.tsv")
    assert main([*line, "--shards", shards, "--manifest", str(tones / "manifest.tsv")]) == 0
    said = capsys.readouterr().out
    assert "frames change their cluster" in said
    assert "probes of phones lose" in said
    graph, model = onnx.load(tmp_path / "out" / "model.onnx"), load_checkpoint(find_checkpoint(str(tmp_path / "run")))
    kinds = [node.op_type for node in graph.graph.node]
    encoder = model.module.model.encoder
    assert isinstance(encoder, BlockStack)
    linear = 4 * len(encoder.blocks)
    assert kinds.count("QuantizeLinear") >= linear - len(encoder.blocks)
    stored = {t.name: t.data_type for t in graph.graph.initializer}
    assert stored["model.frontend.mel.filters"] == onnx.TensorProto.FLOAT, "the filterbank stays in fp32"
    assert sum(kind == onnx.TensorProto.INT8 and "zero_point" not in name for name, kind in stored.items()) == linear
    described = json.loads((tmp_path / "out" / "features.json").read_text())["int8"]
    assert (described["mode"], described["products"]) == ("static", linear)
    assert 0 < described["relative_error"] < 0.1
    wave_T = torch.from_numpy(wave_of(sounds([1.0])[0]) / np.float32(32_768))  # within the calibrated ranges
    expected = model.module.model.eval()(wave_T[None], torch.tensor([16_000])).final.x_BFD[0]
    found = open_graph_encoder(tmp_path / "out").encode(wave_T)[0]
    relative = (found - expected.detach()).square().mean().sqrt() / expected.detach().std()
    assert 0 < float(relative) < 0.05
    assert float((found - expected.detach()).abs().max()) < 0.2
    monkeypatch.setattr("pretrain.compression.quantization.MOST_LOST", -1.0)
    line[2] = str(tmp_path / "refused")
    assert main([*line, "--shards", shards]) == 2
    assert "most is lost in" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_lost_frames_are_counted_against_clusters_of_the_exact_features() -> None:
    def exact(wave_BT: Tensor) -> Tensor:
        return wave_BT.unflatten(1, (-1, 4))

    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0]])
    waves = [(centres[torch.arange(50) % 2] + 0.1 * torch.randn(50, 4, generator=generator)).flatten()]
    assert lost(exact, exact, waves) == Lost(0.0, 0.0)
    moved = lost(exact, lambda wave_BT: exact(wave_BT).roll(1, dims=1), waves)
    assert moved.units > 0.9
    require_accurate(Lost(0.05, 1.0), lambda: "")
    with pytest.raises(ConfigError, match=r"5.1 % of the frames .*most is lost in block 3"):
        require_accurate(Lost(0.051, 0.2), lambda: "block 3")
    with pytest.raises(ConfigError, match=r"nan %"):
        require_accurate(Lost(float("nan"), 0.2), lambda: "block 3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--to", "torchscript", "--int8", "dynamic", "--shards", "x"],
            "needs --to onnx or edge, not --to torchscript",
        ),
        (["--to", "onnx", "--int8", "dynamic"], "needs --shards FOLDER"),
        (["--to", "onnx", "--shards", "x"], "belong to --int8"),
        (["--to", "onnx", "--chunk", "8"], "--chunk, --left: belong to --to onnx_stream, edge, wenet"),
        (["--to", "edge", "--layer", "1"], "--layer 1: belongs to --to torchscript or onnx"),
        (["--to", "onnx", "--int8", "static", "--shards", "NONE"], "--shards NONE: "),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 2)
    assert main(["export", RUN.format(tmp_path), str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_long_segments_leave_two_or_more_to_calibrate_and_compare_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [sounds([25.0, 25.0, 3.0])])
    waves = quantized_export.read_waves(str(shards), 30.0)
    assert [len(wave) for wave in waves] == [round(quantized_export.MOST_SECONDS * 16_000)] * 2


def test_a_probe_that_loses_points_refuses_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.evaluate.rows import ResultRow

    def rows(config: Any, say: Any, encoders: Any) -> list[ResultRow]:
        return [ResultRow("phones", "non-silence frames", who, value) for who, value in (("fp32", 0.5), ("int8", 0.48))]

    monkeypatch.setattr("pretrain.evaluate.evaluator.evaluate", rows)
    with pytest.raises(ConfigError, match=r"lose 2.0 points \(allowed: 1\), 50.0 → 48.0"):
        quantized_export.probe_loss([], "")


def test_a_graph_without_products_of_the_encoder_is_refused(tmp_path: Path) -> None:
    """onnxruntime takes an empty list of nodes for all of them."""
    onnx.save(product(np.eye(4, dtype=np.float32), np.zeros(4, np.float32)), tmp_path / "fp32.onnx")
    with pytest.raises(ConfigError, match="no product with a linear layer of the encoder"):
        quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [], "dynamic", [], False)
    assert not (tmp_path / "int8.onnx").exists()
