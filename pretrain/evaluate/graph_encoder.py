"""Exported ONNX graphs as frozen encoders, so that probes compare them with the run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.nn.numerics import pad_audio


def open_graph_encoder(folder: Path, name: str = "") -> FrozenEncoder:
    """Opens a folder of `auricle export --to onnx`; its encoder has the one layer of the graph.

    Args:
        folder: with model.onnx and features.json.
        name: name in tables; empty: that of the folder.

    Raises:
        ConfigError: the folder is not such an export.
    """
    from onnxruntime import InferenceSession

    try:
        described = json.loads((folder / "features.json").read_bytes())
        rate_hz, least = float(described["output"]["frames_per_second"]), int(described["input"]["least_samples"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder}: not a folder of `auricle export --to onnx` (features.json: {error})") from None
    session = InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def encode(wave_T: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"wave": pad_audio(wave_T[None], least).numpy()})[0])

    return FrozenEncoder(name or folder.name, encode, rate_hz)
