"""auricle export: chooses the exporter of a format, and the head that goes with the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.core.schema import ConfigError
from launch.runs.model_card import write_card
from launch.runs.summary import find_run
from launch.workflows.edge_export import export_edge
from launch.workflows.quantized_export import Int8Options, export_int8
from pretrain.checkpointing.token_sets import require_same_tokens
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint, merged
from pretrain.generation.voice import Voice, voice_of
from pretrain.heads.ctc import CTC
from pretrain.heads.synthesis import Synthesis
from pretrain.interop import (
    export_tolerance,
    graph_export,
    hf_export,
    stream_export,
    synthesis_export,
    wenet_export,
)
from pretrain.recognition.recogniser import recognising_head

STREAMS = ("onnx_stream", "edge", "wenet")
WITH_HEAD = ("hugging_face", "onnx_stream", "onnx_synthesis", "edge", "wenet")
"""Formats that hold a head too, or nothing else."""
ON_ONNX = ("onnx", "onnx_stream", "onnx_synthesis", "edge", "wenet")
"""Formats that are written and compared with the packages of ONNX."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    layer: of torchscript and onnx; -1: the last.  chunk, left: of onnx_stream, edge and wenet; None: the first trained.
    head: name of the head to export.  int8: how to quantise onnx and edge; None: fp32.
    licence: of the weights, for the model card; "": not stated.

    Raises:
        ConfigError: options do not fit together.
    """

    to: Literal["hugging_face", "torchscript", "onnx", "onnx_stream", "onnx_synthesis", "edge", "wenet"] = (
        "hugging_face"
    )
    layer: int = -1
    chunk: int | None = None
    left: int | None = None
    head: str = ""
    int8: Int8Options | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        if self.head and self.to not in WITH_HEAD:
            raise ConfigError(f"--head {self.head}: needs --to {', '.join(WITH_HEAD)}; --to {self.to} has no head")
        if (self.chunk is not None or self.left is not None) and self.to not in STREAMS:
            raise ConfigError(f"--chunk, --left: belong to --to {', '.join(STREAMS)}; --to {self.to} is not a stream")
        if self.layer != -1 and self.to not in ("torchscript", "onnx"):
            raise ConfigError(f"--layer {self.layer}: belongs to --to torchscript or onnx, not --to {self.to}")
        if self.int8 is None:
            return
        if self.to not in ("onnx", "edge"):
            raise ConfigError(f"--int8 {self.int8.mode}: needs --to onnx or edge, not --to {self.to}")
        if self.to == "edge" and self.int8.mode == "static":
            raise ConfigError("--int8 static: --to edge takes --int8 dynamic")


def export_run(run: str, out: Path, options: ExportOptions) -> str:
    """Exports a run with a model card, after comparing the features of the loaded copy with the run's.

    Args:
        run: a run folder, a checkpoint, or a run's name below runs/.
        out: folder to write; must not exist.
        options: the format and its settings.

    Returns:
        One phrase on the difference.

    Raises:
        ConfigError: the run cannot be exported in this format; nothing is written then.
    """
    said = _export(run, out, options)
    write_card(out, run, options.to, options.licence)
    return said


def _export(run: str, out: Path, options: ExportOptions) -> str:
    if options.to in ON_ONNX:
        graph_export.require("onnx", "onnxscript", "onnxruntime")  # before seconds of loading
    path = Path(run).expanduser()
    checkpoint = hf_export.run_checkpoint(path if (path / "state.json").is_file() else find_run(run))
    found = merged(load_checkpoint(checkpoint))
    if options.to == "edge":
        head = _head(run, checkpoint, found, options)
        return export_edge(found, out, chunk=options.chunk, left=options.left, int8=options.int8, head=head)
    if options.int8 is not None:
        return export_int8(found, out, options.layer, options.int8)
    config, module = found.config, found.module
    if options.to == "onnx_synthesis":
        voice = voice_of(run, module, config, options.head, kinds=(Synthesis,))
        assert isinstance(voice, Voice)
        error = synthesis_export.export_synthesis(voice.head, voice.tokenizer, out, config.name)
    elif options.to == "wenet":
        head = _head(run, checkpoint, found, options)
        error = wenet_export.export_wenet(
            config, module.model, out, chunk=options.chunk, left_chunks=options.left, head=head
        )
    elif options.to == "hugging_face":
        error = hf_export.export(config, module, out, options.head)
    elif options.to == "onnx_stream":
        head = _head(run, checkpoint, found, options)
        error = stream_export.export_stream(
            config, module.model, out, chunk=options.chunk, left_chunks=options.left, head=head
        )
    else:
        error = graph_export.export_graph(config, module.model, out, options.to, options.layer)
    what = {"onnx_synthesis": "audio", "wenet": "ln p"}.get(options.to, "features")
    return f"{what} of the loaded copy differ by {error:.1e} (allowed: {export_tolerance.TOLERANCE[options.to]:.0e})"


def _head(run: str, checkpoint: Path, found: LoadedCheckpoint, options: ExportOptions) -> CTC | None:
    """Returns the CTC head of a streaming export; None for a run without one."""
    if not options.head and not any(isinstance(head, CTC) for head in found.module.heads.values()):
        return None
    head = recognising_head(run, found.module, found.config, options.head)
    if head.tokens:
        require_same_tokens(checkpoint, found.config, head.tokens)
    return head
