"""auricle export: writes a run as a Hugging Face model folder, or as a TorchScript or ONNX graph."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

FORMATS = ("hugging_face", "torchscript", "onnx", "onnx_stream", "edge")
WITH_HEAD = ("hugging_face", "onnx_stream", "edge")
"""Formats that hold a CTC head too."""


def run(arguments: list[str]) -> int:
    """Writes the export; returns 0. Raises ConfigError for a run that cannot be exported in this format."""
    parser = Parser("auricle export", description="exports a run for other tools, verified before it is written")
    parser.add_argument("run", help="run folder, or a run's name below runs/")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        default="hugging_face",
        help="hugging_face: for from_pretrained, if transformers has the architecture; torchscript, onnx: one file for "
        "most architectures; onnx_stream: one chunk of a stream, with its states as inputs and outputs; edge: such a "
        "graph with a program that runs it (default: hugging_face)",
    )
    parser.add_argument(
        "--layer", type=int, default=-1, help="torchscript, onnx: the layer that is returned (-1: the last)"
    )
    parser.add_argument("--chunk", type=int, help="onnx_stream, edge: frames per chunk (the first trained length)")
    parser.add_argument(
        "--left", type=int, help="onnx_stream, edge: earlier chunks attended to (the first trained number)"
    )
    parser.add_argument(
        "--head",
        default="",
        help="hugging_face, onnx_stream, edge: the CTC head to export too (the only one of a recogniser)",
    )
    parser.add_argument(
        "--int8",
        choices=("dynamic", "static"),
        help="onnx, edge (dynamic): 8-bit products of linear layers, with ranges of activations computed in each call, "
        "or fixed from --shards; written only if as accurate as fp32",
    )
    parser.add_argument("--shards", help="int8: shard folder with the audio for calibration and comparison")
    parser.add_argument(
        "--manifest", help="int8: also compare probes of phones; a manifest as of auricle evaluate, '' for its default"
    )
    parser.add_argument(
        "--reduce-range", action="store_true", help="int8: 7 bits for weights, for x86 devices without VNNI"
    )
    given = parser.parse_args(arguments)
    _require_int8_options(given)
    if given.head and given.to not in WITH_HEAD:
        raise ConfigError(f"--head {given.head}: needs --to {', '.join(WITH_HEAD)}; --to {given.to} has no head")

    from launch.runs.summary import find_run
    from launch.workflows.edge_export import export_edge
    from launch.workflows.quantized_export import Int8Options, export_int8
    from pretrain.heads.ctc import CTC
    from pretrain.interop import graph_export, stream_export
    from pretrain.interop.hf_export import TOLERANCE, export, load_run
    from pretrain.recognition.recogniser import recognising_head

    path = Path(given.run).expanduser()
    found = load_run(path if (path / "state.json").is_file() else find_run(given.run))
    module, config, _ = found
    options = Int8Options(given.int8, given.shards, given.manifest, given.reduce_range) if given.int8 else None
    head = None
    if given.to in ("onnx_stream", "edge") and (given.head or any(isinstance(h, CTC) for h in module.heads.values())):
        head = recognising_head(given.run, module, config, given.head)
    if given.to == "edge":
        print(f"{given.out}: {export_edge(found, given.out, given.chunk, given.left, options, head)}")
        return ExitCode.DONE
    if options is not None:
        print(f"{given.out}: {export_int8(found, given.out, given.layer, options)}")
        return ExitCode.DONE
    if given.to == "hugging_face":
        error, allowed = export(config, module, given.out, given.head), TOLERANCE
    elif given.to == "onnx_stream":
        error = stream_export.export_stream(config, module.model, given.out, given.chunk, given.left, head)
        allowed = graph_export.TOLERANCE["onnx"]
    else:
        error = graph_export.export_graph(config, module.model, given.out, given.to, given.layer)
        allowed = graph_export.TOLERANCE[given.to]
    print(f"{given.out}: features of the loaded copy differ by {error:.1e} (allowed: {allowed:.0e})")
    return ExitCode.DONE


def _require_int8_options(given: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not fit together."""
    if given.int8 and given.to not in ("onnx", "edge"):
        raise ConfigError(f"--int8 {given.int8}: needs --to onnx or edge, not --to {given.to}")
    if given.to == "edge" and (given.int8 == "static" or given.manifest is not None):
        raise ConfigError("--to edge: takes --int8 dynamic without --manifest; its comparison is on --shards")
    if given.int8 and not given.shards:
        raise ConfigError(f"--int8 {given.int8}: needs --shards FOLDER, the audio to calibrate and compare on")
    if not given.int8 and (given.shards or given.manifest is not None or given.reduce_range):
        raise ConfigError("--shards, --manifest and --reduce-range belong to --int8; add --int8 dynamic or static")
