"""A run as one file that needs none of our code: TorchScript, or ONNX. (B, T) audio in, (B, F, D) features out.

Unlike a Hugging Face folder this holds any architecture that can be traced: front end, encoder and, for models that
want it, the normalisation of the wave. All rows of a batch are of one length: a graph knows no padding. Nothing is
written unless what was exported, loaded again, gives our features for other batch sizes and lengths than it was made
with.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.interfaces.models import Encoder, SpeechModel

Format = Literal["torchscript", "onnx"]
FILES: dict[Format, str] = {"torchscript": "model.ts", "onnx": "model.onnx"}
TOLERANCE: dict[Format, float] = {"torchscript": 1e-5, "onnx": 1e-4}
"""Largest difference as a share of the largest feature, in fp32: an ONNX runtime sums in another order than torch."""
CHECKED = ((1, 16_000), (3, 11_680), (2, 36_123))
"""Rows and samples of the audio that is compared; the graph is made with two rows of 24,000 samples."""
Run = Callable[[Tensor], Tensor]


class Features(nn.Module):
    """What is exported: one layer of the frozen model."""

    def __init__(self, model: SpeechModel, layer: int) -> None:
        super().__init__()
        assert isinstance(model.encoder, Encoder)
        self.model, self.layer = model, layer
        model.frontend.packed = model.encoder.packed = False  # rows of one length: the same, and a graph can hold it
        if layer < model.encoder.n_layers:
            model.encoder.stop_after = layer

    def forward(self, wave_BT: Tensor) -> Tensor:
        """(B, T) audio at 16 kHz to (B, F, D)."""
        lengths_B = torch.full((wave_BT.shape[0],), wave_BT.shape[1], dtype=torch.int64, device=wave_BT.device)
        layers: tuple[Tensor, ...] = self.model(wave_BT, lengths_B).layers
        return layers[self.layer]


def export_graph(config: Config, model: SpeechModel, folder: Path, kind: Format, layer: int = -1) -> float:
    """Writes the graph and features.json, which describes it; returns the worst error of the gate, as in TOLERANCE.

    layer: 0 is what enters the first block; -1: the last. Raises ConfigError for a layer that the model does not have,
    an architecture that cannot be exported, a missing package, an existing folder, and when the gate fails.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give a new folder to export to")
    n_layers = model.shape.n_layers
    if not -1 <= layer <= n_layers:
        raise ConfigError(f"--layer {layer}: this model has the layers 0 to {n_layers}")
    layer = n_layers if layer == -1 else layer
    features = Features(copy.deepcopy(model).cpu().float().eval(), layer)
    described = {
        "format": kind,
        "input": {"wave": ["batch", "samples"], "sample_rate": SAMPLE_RATE, "type": "float32"},
        "output": {"features": ["batch", "frames", model.shape.dim], "frames_per_second": model.shape.rate_hz},
        "layer": layer,
        "run": config.name,
        "architecture": {part: getattr(config, part).name for part in ("frontend", "encoder", "objective")},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name) / "model"
        temporary.mkdir()
        run = _made(features, temporary / FILES[kind], kind, config)
        error = gate(features, run)
        if not error <= TOLERANCE[kind]:
            raise ConfigError(
                f"{_architecture(config)}: the exported graph's features differ by {error:.1e} of their largest value "
                f"(allowed: {TOLERANCE[kind]:.0e}), so nothing was written"
            )
        (temporary / "features.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        shutil.move(str(temporary), folder)
    return error


@torch.no_grad()
def gate(features: Features, run: Run) -> float:
    """Largest difference over all checked shapes, as a share of the largest feature; infinite where a shape fails."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows, samples in CHECKED:
        wave_BT = 0.1 * torch.randn(rows, samples, generator=generator)
        expected = features(wave_BT)
        try:
            found = run(wave_BT)
        except Exception as error:  # onnxruntime's and TorchScript's errors have no common base
            raise ConfigError(
                f"the exported graph does not run on {rows} × {samples} samples: {_first(error)}"
            ) from None
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def _made(features: Features, file: Path, kind: Format, config: Config) -> Run:
    """Exports to `file`, and loads it as anybody would."""
    if kind == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing; the gate is what tells
            if kind == "torchscript":
                return _torchscript(features, file)
            return _onnx(features, file)
    except ConfigError:
        raise
    except Exception as error:  # what an exporter cannot trace, it says by any exception
        raise ConfigError(
            f"{_architecture(config)} cannot be exported as {kind}: {_first(error)}. The run's own checkpoint stays"
        ) from None


def _torchscript(features: Features, file: Path) -> Run:
    traced: Any = torch.jit.trace(features, 0.1 * torch.randn(2, 24_000), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(file))
    loaded: Run = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
    return loaded


def _onnx(features: Features, file: Path) -> Run:
    from onnxruntime import InferenceSession

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("samples", min=1_600, max=SAMPLE_RATE * 3_600)}
    # guards are left to run time, since they are about memory layouts, which ONNX does not have
    program = torch.export.export(
        features,
        (0.1 * torch.randn(2, 24_000),),
        dynamic_shapes={"wave_BT": sizes},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    torch.onnx.export(
        program,
        (),
        str(file),
        input_names=["wave"],
        output_names=["features"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(wave_BT: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"wave": wave_BT.numpy()})[0])

    return run


def _require(*packages: str) -> None:
    import importlib.util

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'auricle[onnx]'")


def _architecture(config: Config) -> str:
    attention = f", encoder.attention={config.encoder.attention}" if hasattr(config.encoder, "attention") else ""
    return f"frontend.name={config.frontend.name}, encoder.name={config.encoder.name}{attention}"


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line] or lines or [""]  # TorchScript puts the cause last
    return f"{type(error).__name__}: {telling[-1]}"[:300]
