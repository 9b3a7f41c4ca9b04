"""auricle bench: slower graphs take longer; memory, size and noise are reported; streams run chunk by chunk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from launch.main import main
from pretrain.profiling.graph_timing import measure_graphs, median_and_p95, noise
from tests.support.training import save

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def node(*arguments: Any, **fields: Any) -> Any:
    return onnx.helper.make_node(*arguments, **fields)


def graph(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any]) -> Any:
    h, kinds = onnx.helper, {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    given, made = (
        [h.make_tensor_value_info(name, kinds[kind], shape) for name, (kind, shape) in part.items()]
        for part in (inputs, outputs)
    )
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    opset = [h.make_opsetid("", 18)]
    return h.make_model(h.make_graph(nodes, "g", given, made, stored), opset_imports=opset, ir_version=10)


def whole(folder: Path, repeats: int, size: int = 256) -> Path:
    """Writes a graph that multiplies frames of 160 samples by a matrix `repeats` times."""
    names = ["x0", *(f"x{number + 1}" for number in range(repeats))]
    nodes = [node("Reshape", ["wave", "shape"], ["frames"]), node("MatMul", ["frames", "first"], ["x0"])]
    nodes += [node("MatMul", [one, "w"], [two]) for one, two in itertools.pairwise(names)]
    nodes.append(node("Identity", [names[-1]], ["features"]))
    constants = {
        "shape": np.array([1, -1, 160]),
        "first": np.ones((160, size), np.float32),
        "w": np.eye(size, dtype=np.float32),
    }
    folder.mkdir()
    inputs, outputs = {"wave": ("f", [1, None])}, {"features": ("f", [1, None, size])}
    onnx.save(graph(nodes, inputs, outputs, constants), folder / "model.onnx")
    (folder / "features.json").write_text("{}")
    return folder


def stream(folder: Path) -> Path:
    """Writes a graph of one chunk of 4 frames whose state is the sum of all samples before."""
    nodes = [
        node("ReduceSum", ["wave", "axes"], ["sum"], keepdims=1),
        node("Add", ["sum", "total"], ["next_total"]),
        node("Expand", ["next_total", "wide"], ["features"]),
        node("Identity", ["four"], ["lengths"]),
    ]
    constants = {"axes": np.array([1]), "wide": np.array([1, 4]), "four": np.array([4])}
    inputs = {"wave": ("f", [1, 800]), "total": ("f", [1, 1])}
    outputs = {"features": ("f", [1, 4]), "lengths": ("i", [1]), "next_total": ("f", [1, 1])}
    folder.mkdir()
    onnx.save(graph(nodes, inputs, outputs, constants), folder / "stream.onnx")
    about = {"window_samples": 800, "advance_samples": 640, "zeros_before": 160, "states": {"total": [1]}}
    (folder / "stream.json").write_text(json.dumps(about))
    return folder


def test_a_graph_with_more_products_takes_longer_and_streams_answer_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = whole(tmp_path / "small", 1), whole(tmp_path / "large", 60)
    folders = [str(large), str(small), str(stream(tmp_path / "chunks"))]
    assert main(["bench", *folders, "--runs", "5", "--seconds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    slow, fast, chunks = found["graphs"]
    assert [one["name"] for one in found["graphs"]] == ["large", "small", "chunks"]
    assert slow["cpu_rtf"] > 2 * fast["cpu_rtf"] > 0
    assert slow["rtf_p50"] <= slow["rtf_p95"]
    assert slow["first_output_ms"] > 2000 > 100 > chunks["first_output_ms"] > 40
    assert slow["file_mb"] == pytest.approx((large / "model.onnx").stat().st_size / 1e6)
    assert slow["peak_rss_mb"] > slow["bare_rss_mb"] > 5
    assert main(["bench", *folders, "--runs", "2", "--seconds", "1"]) == 0
    assert "large" in capsys.readouterr().out


def test_noise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 0.0, 0.0))
    assert noise({"a": (0.01, 0.011)}) == ""
    assert noise({"a": (0.01, 0.011)}, load=2.5) == "load 2.5 on 2 cores"
    assert noise({"a": (0.01, 0.011), "b": (0.01, 0.02)}).startswith("the 95th percentile of b")
    monkeypatch.setattr("os.getloadavg", lambda: (7.0, 0.0, 0.0))
    assert noise({}) == "load 7.0 on 2 cores"


@pytest.mark.slow
def test_a_table_of_blocks_grows_with_their_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = {"name": "transformer", "layers": 2, "dim": 64, "heads": 4, "ffn_dim": 64}
    save(tmp_path / "run", 2, encoder=encoder)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_00000002")
    line = ["bench", "--table", checkpoint, "--heads", "1", "--ffn", "64,4096", "--runs", "5", "--seconds", "20"]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    narrow, wide = found["rows"]
    assert (narrow[:2], wide[:2], found["dim"]) == ([1, 64], [1, 4096], 64)
    assert wide[2] > 2 * narrow[2] > 0
    assert main([*line[:5], "--ffn", "0"]) == 2
    assert main(["bench", str(tmp_path), "--ffn", "8"]) == 2


def test_percentiles() -> None:
    assert median_and_p95([3.0, 1.0, 2.0]) == (2.0, 3.0)
    assert median_and_p95([float(value) for value in range(1, 101)]) == (50.5, 95.0)


def test_a_folder_without_a_graph_and_a_graph_that_does_not_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder of `auricle export"):
        measure_graphs([tmp_path])
    folder = whole(tmp_path / "broken", 1)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"broken: the graph does not run: .*Protobuf|broken: the graph does not run"):
        measure_graphs([folder], 1.0, 1)
    assert main(["bench", str(folder), "--runs", "0"]) == 2
