"""Exports a run as one self-contained TorchScript or ONNX file, from (B, T) audio to (B, F, D) features.

Unlike a Hugging Face folder it supports any architecture that can be traced: front end, encoder and, for models that
need it, the normalisation of the waveform. All rows of a batch have the same length: a graph has no padding. Nothing is
written unless the exported graph, loaded from its file, reproduces the features for other batch sizes and lengths than
it was traced with.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.interfaces.models import Encoder, SpeechModel
from pretrain.interop.export_tolerance import require_close
from pretrain.nn.stack_config import StackConfig

GraphFormat = Literal["torchscript", "onnx"]
FILES: dict[GraphFormat, str] = {"torchscript": "model.ts", "onnx": "model.onnx"}
CHECKED = ((1, 16_000), (3, 11_680), (2, 36_123))
"""Rows and samples of the audio for the comparison; the graph is traced with two rows of 24,000 samples."""
LEAST_FRAMES = 4
"""Fewest encoder frames that a graph accepts; with one frame, also at half the rate, tracing gives another graph."""
Run = Callable[[Tensor], Tensor]
"""An exported graph: (B, T) audio to (B, F, D) features."""


class Features(nn.Module):
    """The exported module: one layer of the frozen model.

    Args:
        model: front end and encoder; modified in place (packing off, stops after `layer`).
        layer: 0 is the input of the first block.
    """

    def __init__(self, model: SpeechModel, layer: int) -> None:
        super().__init__()
        assert isinstance(model.encoder, Encoder)
        self.model, self.layer = model, layer
        model.frontend.packed = model.encoder.packed = False  # same result without padding, and traceable
        if layer < model.encoder.n_layers:
            model.encoder.stop_after = layer
        self.least_samples = max(1_600, model.frontend.least_samples(LEAST_FRAMES))

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Returns the layer's output, (B, F, D), for (B, T) audio at 16 kHz."""
        lengths_B = torch.full((wave_BT.shape[0],), wave_BT.shape[1], dtype=torch.int64, device=wave_BT.device)
        layers: tuple[Tensor, ...] = self.model(wave_BT, lengths_B).layers
        return layers[self.layer]


def export_graph(config: Config, model: SpeechModel, folder: Path, kind: GraphFormat, layer: int = -1) -> float:
    """Writes the graph and its description, features.json.

    Args:
        config: the config that `model` was trained with.
        model: front end and encoder; not modified.
        folder: must not exist; is created complete or not at all.
        kind: "torchscript" or "onnx".
        layer: 0 is the input of the first block; -1 the last layer.

    Returns:
        The largest difference between exported and original features, relative to the largest feature.

    Raises:
        ConfigError: the model lacks the layer, its architecture cannot be exported, a package is missing, `folder`
            exists, or the features of the exported graph differ by more than TOLERANCE.
        OSError: the folder cannot be written; nothing is left behind.
    """
    n_layers = model.shape.n_layers
    if not -1 <= layer <= n_layers:
        raise ConfigError(f"--layer {layer}: this model has the layers 0 to {n_layers}")
    layer = n_layers if layer == -1 else layer
    features = Features(copy.deepcopy(model).cpu().float().eval(), layer)
    described: dict[str, Any] = {
        "format": kind,
        "input": {"wave": ["batch", "samples"], "sample_rate": SAMPLE_RATE, "type": "float32"},
        "output": {"features": ["batch", "frames", model.shape.dim], "frames_per_second": model.shape.rate_hz},
        "layer": layer,
        "run": config.name,
        "architecture": {part: getattr(config, part).name for part in ("frontend", "encoder", "objective")},
    }
    if kind == "onnx":
        described["input"]["least_samples"] = features.least_samples
    with new_folder(folder) as made:
        run = _made(features, made / FILES[kind], kind, config)
        error = largest_difference(features, run)
        require_close(error, kind, architecture_label(config))
        (made / "features.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return error


def write_graph(config: Config, model: SpeechModel, file: Path) -> None:
    """Writes the ONNX graph of the last layer without a comparison, to measure its speed.

    Args:
        config: the config that `model` was trained with.
        model: front end and encoder; not modified.
        file: the file to write.

    Raises:
        ConfigError: the architecture cannot be exported, or a package is missing.
    """
    _made(Features(copy.deepcopy(model).cpu().float().eval(), model.shape.n_layers), file, "onnx", config)


@torch.no_grad()
def largest_difference(features: Features, run: Run) -> float:
    """Compares an exported graph with the original on all CHECKED shapes.

    Args:
        features: the original.
        run: the exported graph, (B, T) audio to (B, F, D) features.

    Returns:
        The largest difference, relative to the largest feature; inf for a wrong shape.

    Raises:
        ConfigError: the graph does not run on one of the shapes.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows, samples in CHECKED:
        wave_BT = 0.1 * torch.randn(rows, samples, generator=generator)
        expected = features(wave_BT)
        try:
            found = run(wave_BT)
        except Exception as error:  # onnxruntime's and TorchScript's errors have no common base
            raise ConfigError(
                f"the exported graph does not run on {rows} × {samples} samples: {first_line(error)}"
            ) from None
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def _made(features: Features, file: Path, kind: GraphFormat, config: Config) -> Run:
    """Exports to `file` and loads it the way other tools would."""
    if kind == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warnings; `largest_difference` compares the results
            if kind == "torchscript":
                return _torchscript(features, file)
            return _onnx(features, file)
    except (ConfigError, OSError):
        raise
    except Exception as error:  # exporters raise any type for what they cannot trace
        raise ConfigError(
            f"{architecture_label(config)} cannot be exported as {kind}: {first_line(error)}. The run's checkpoint is "
            "unchanged"
        ) from None


def _torchscript(features: Features, file: Path) -> Run:
    traced: Any = torch.jit.trace(features, 0.1 * torch.randn(2, 24_000), check_trace=False)  # type: ignore[no-untyped-call]
    # via memory: torch's own file writer aborts the process on a full disk
    content = io.BytesIO()
    torch.jit.save(traced, content)
    write_synced(file, content.getvalue())
    loaded: Run = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
    return loaded


def program(features: Features) -> torch.export.ExportedProgram:
    """Returns the graph for any batch size and length that ONNX is written from."""
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC(min=features.least_samples)}
    # guards are deferred to run time: they concern memory layouts, which ONNX does not have
    return torch.export.export(
        features,
        (0.1 * torch.randn(2, 24_000),),
        dynamic_shapes={"wave_BT": sizes},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _onnx(features: Features, file: Path) -> Run:
    made: Any = torch.onnx.export(
        program(features), (), input_names=["wave"], output_names=["features"], dynamo=True, verbose=False
    )
    write_synced(file, made.model_proto.SerializeToString())
    return open_graph(file)


def open_graph(file: Path, threads: int = 0) -> Run:
    """Opens an ONNX file of `auricle export` on the CPU.

    Args:
        file: the graph.
        threads: intra-op threads; 0: as many as there are cores.

    Returns:
        A function from (B, T) audio to (B, F, D) features.
    """
    session = open_session(file, threads)

    def run(wave_BT: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"wave": wave_BT.numpy()})[0])

    return run


def require(*packages: str) -> None:
    """Raises ConfigError, with the remedy, where one of the packages that ONNX needs is missing."""
    import importlib.util

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


def architecture_label(config: Config) -> str:
    """Returns the fields that name a run's architecture, for messages."""
    encoder = config.encoder
    attention = f", encoder.attention={encoder.attention}" if isinstance(encoder, StackConfig) else ""
    return f"frontend.name={config.frontend.name}, encoder.name={config.encoder.name}{attention}"


def first_line(error: Exception) -> str:
    """Returns the line of an exporter's error that has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Error" in line] or lines or [""]  # TorchScript puts the cause last
    return f"{type(error).__name__}: {causes[-1]}"[:300]
