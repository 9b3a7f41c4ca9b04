"""Exported ONNX graphs as frozen encoders, so that probes compare them with the run."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.interop.graph_export import open_graph
from pretrain.nn.numerics import pad_audio


def open_graph_encoder(folder: Path, name: str = "") -> FrozenEncoder:
    """Opens a folder of `auricle export --to onnx`; its encoder has the one layer of the graph.

    Args:
        folder: with model.onnx and features.json.
        name: name in tables; empty: that of the folder.

    Raises:
        ConfigError: the folder is not such an export.
    """
    try:
        described = read_object(folder / "features.json")
        rate_hz, least = float(described["output"]["frames_per_second"]), int(described["input"]["least_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a folder of `auricle export --to onnx` (features.json: {error})") from None
    run = open_graph(folder / "model.onnx")
    return FrozenEncoder(name or folder.name, lambda wave_T: run(pad_audio(wave_T[None], least)), rate_hz)
