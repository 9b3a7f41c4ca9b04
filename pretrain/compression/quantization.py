"""INT8 graphs: quantises the products with weights of an exported ONNX graph, by onnxruntime.

Weights are signed 8-bit integers with a scale per output channel; activations unsigned 8-bit integers, with a scale
that is computed for each call ("dynamic") or fixed from given audio ("static"). Only linear layers of the encoder are
quantised: the spectrogram and its filterbank have a range that 8 bits do not hold, the front end's projection takes no
time and its error reaches all layers, and products of two activations gain nothing.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.models import SpeechModel
from pretrain.interop.graph_export import Run, open_graph
from pretrain.nn.fake_int8 import int8_layers
from pretrain.profiling.processor import instruction_sets
from pretrain.self_supervision.kmeans import kmeans
from pretrain.self_supervision.quantizers import nearest_codes

Mode = Literal["dynamic", "static"]
UNITS = 64
"""Clusters of frames whose agreement is compared."""
MOST_LOST = 0.05
"""Largest share of frames that may change their cluster."""


class Lost(NamedTuple):
    """Accuracy that a quantised graph loses.

    units: share of frames whose nearest cluster changes.  error: root mean square of the features' difference relative
    to that of their deviation.
    """

    units: float
    error: float


def linear_products(graph: Any, model: SpeechModel) -> list[str]:
    """Returns the names of the nodes of an ONNX graph that are products with the weight of the encoder's linear layers.

    Args:
        graph: the ModelProto that `model` was exported to, alone or as a part of a module.
        model: front end and encoder.
    """
    linear = int8_layers(model)
    constants = {tensor.name for tensor in graph.graph.initializer}
    found = []
    for node in graph.graph.node:
        scopes = {part.key: part.value for part in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        inside = any(scope.endswith(f".{name}") for scope in re.findall(r"'([^']*)'", scopes) for name in linear)
        if node.op_type == "MatMul" and inside and constants.intersection(node.input):
            found.append(str(node.name))
    return found


def has_vnni() -> bool:
    """Returns whether this processor multiplies 8-bit integers without saturation (VNNI, or any ARM)."""
    return any("vnni" in name or name == "asimddp" for name in instruction_sets())


def quantize(
    source: Path, target: Path, nodes: Sequence[str], mode: Mode, waves: Sequence[Tensor], reduce_range: bool
) -> None:
    """Writes the INT8 version of an ONNX file.

    Args:
        source: the fp32 graph.
        target: the file to write.
        nodes: names of the products to quantise, from `linear_products`.
        mode: "dynamic" or "static".
        waves: audio that sets the ranges of activations in static mode, (T,) each.
        reduce_range: 7 bits for weights, for processors whose 8-bit products saturate (x86 without VNNI).

    Raises:
        ConfigError: static mode without audio, or no products: onnxruntime would then quantise all, the filterbank too.
    """
    if not nodes:
        raise ConfigError(
            "--int8: the graph has no product with a linear layer of the encoder, which alone run in 8 bits; "
            "export it without --int8, or a later --layer"
        )
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    options: dict[str, Any] = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]}
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": QuantType.QInt8,
        "nodes_to_quantize": list(nodes),
        "extra_options": options,
    }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / "model.onnx"
        if mode == "dynamic":
            quantize_dynamic(onnx.load(source), made, **common)
        else:
            if not waves:
                raise ConfigError("--int8 static needs audio to measure the ranges of activations: give --shards")
            quantize_static(
                onnx.load(source),
                made,
                _Calibration(waves),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                **common,
            )
        write_synced(target, made.read_bytes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides onnxruntime's advice to run its shape inference first: exported graphs have shapes."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Calibration:
    """Audio for onnxruntime's calibration; its interface of a CalibrationDataReader."""

    def __init__(self, waves: Sequence[Tensor]) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([{"wave": wave[None].numpy()} for wave in waves])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.feeds


def lost(exact: Run, quantized: Run, waves: Sequence[Tensor]) -> Lost:
    """Compares two graphs on audio.

    Accuracy without labels: k-means clusters of the exact features are classes, and a frame counts as lost where the
    nearest centre of its quantised features is another one.

    Args:
        exact: the fp32 graph.
        quantized: the INT8 graph.
        waves: audio, (T,) each.
    """
    expected_ND = torch.cat([exact(wave[None])[0] for wave in waves])
    found_ND = torch.cat([quantized(wave[None])[0] for wave in waves])
    mean_D, deviation_D = expected_ND.mean(0), expected_ND.std(0).clamp(min=1e-6)
    expected_ND, found_ND = ((x_ND - mean_D) / deviation_D for x_ND in (expected_ND, found_ND))
    centres_KD = kmeans(expected_ND, min(UNITS, max(2, len(expected_ND) // 10)), seed=0, iterations=20)
    same = nearest_codes(expected_ND, centres_KD) == nearest_codes(found_ND, centres_KD)
    return Lost(1 - float(same.float().mean()), float((found_ND - expected_ND).square().mean().sqrt()))


def require_accurate(found: Lost, worst: Callable[[], str]) -> None:
    """Raises ConfigError where too many frames change their cluster.

    Args:
        found: what the graph loses.
        worst: names the layers that lose most; called only then.
    """
    if not found.units <= MOST_LOST:
        raise ConfigError(
            f"--int8: {100 * found.units:.1f} % of the frames change their cluster (allowed: {100 * MOST_LOST:.0f} %), "
            f"features differ by {100 * found.error:.1f} %; most is lost in {worst()}. Take --int8 dynamic, calibrate "
            "static ranges on more audio, or train on with smaller weights (optimizer.weight_decay)"
        )


def worst_block(
    source: Path, graph: Any, nodes: Sequence[str], mode: Mode, waves: Sequence[Tensor], reduce_range: bool
) -> str:
    """Returns the part of the model that loses most frames where it alone is quantised.

    Args:
        source: the fp32 graph.
        graph: the same, as an ONNX model.
        nodes: names of the nodes that are quantised.
        mode: dynamic or static ranges.
        waves: (T,) audio at 16 kHz by which frames are compared.
    """
    parts: dict[str, list[str]] = {}
    for node in graph.graph.node:
        if node.name in nodes:
            scopes = {part.key: part.value for part in node.metadata_props}["pkg.torch.onnx.name_scopes"]
            block = re.search(r"encoder\.blocks\.\d+", scopes)
            parts.setdefault(block[0] if block else "the front end", []).append(node.name)
    exact, scores = open_graph(source, threads=1), {}
    with tempfile.TemporaryDirectory() as folder:
        for part, names in parts.items():
            file = Path(folder) / "part.onnx"
            quantize(source, file, names, mode, waves, reduce_range)
            scores[part] = lost(exact, open_graph(file, threads=1), waves)
    part = max(scores, key=lambda name: scores[name].units)
    return f"{part} ({100 * scores[part].units:.1f} % alone)"
