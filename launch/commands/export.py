"""auricle export: writes a run as a Hugging Face model folder, or as a TorchScript or ONNX graph."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.schema import ConfigError
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

if TYPE_CHECKING:
    from launch.workflows.quantized_export import Int8Options

FORMATS = ("hugging_face", "torchscript", "onnx", "onnx_stream", "onnx_synthesis", "edge", "wenet")


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
        "most architectures; onnx_stream: one chunk of a stream, with its states as inputs and outputs; "
        "onnx_synthesis: a synthesis head, from tokens to audio; edge: such a "
        "graph with a program that runs it; wenet: a streaming CTC recogniser for sherpa-onnx (default: hugging_face)",
    )
    parser.add_argument(
        "--layer", type=int, default=-1, help="torchscript, onnx: the layer that is returned (-1: the last)"
    )
    parser.add_argument(
        "--chunk", type=int, help="onnx_stream, edge, wenet: frames per chunk (the first trained length)"
    )
    parser.add_argument(
        "--left", type=int, help="onnx_stream, edge, wenet: earlier chunks attended to (the first trained number)"
    )
    parser.add_argument(
        "--head",
        default="",
        help="the head to export too (the only one of a recogniser): hugging_face, onnx_stream, edge, wenet: CTC; "
        "hugging_face: also an attention decoder; onnx_synthesis: a synthesis head",
    )
    parser.add_argument(
        "--int8",
        choices=("dynamic", "static"),
        help="onnx, edge (dynamic): 8-bit products of linear layers, with ranges of activations computed in each call, "
        "or fixed from --shards; written only if as accurate as fp32",
    )
    parser.add_argument("--shards", help="int8: shard folder with the audio for calibration and comparison")
    parser.add_argument(
        "--manifest",
        help="int8: also compare probes of phones, or for an edge recogniser its word error rate, on the speakers of "
        "the split valid; a manifest as of auricle evaluate, '' for its default",
    )
    parser.add_argument(
        "--reduce-range", action="store_true", help="int8: 7 bits for weights, for x86 devices without VNNI"
    )
    parser.add_argument(
        "--licence", default="", help="licence of the weights for the model card, such as cc-by-nc-4.0 (not recorded)"
    )
    given = parser.parse_args(arguments)

    from launch.workflows.exporting import ExportOptions, export_run

    int8 = _int8_options(given)
    options = ExportOptions(
        given.to,
        layer=given.layer,
        chunk=given.chunk,
        left=given.left,
        head=given.head,
        int8=int8,
        licence=given.licence.strip(),
    )
    print(f"{given.out}: {export_run(given.run, given.out, options)}")
    return ExitCode.DONE


def _int8_options(given: argparse.Namespace) -> Int8Options | None:
    """Returns the settings of quantisation. Raises ConfigError where an option is missing or has no effect."""
    from launch.workflows.quantized_export import Int8Options

    if given.int8 and not given.shards:
        raise ConfigError(f"--int8 {given.int8}: needs --shards FOLDER, the audio to calibrate and compare on")
    if not given.int8 and (given.shards or given.manifest is not None or given.reduce_range):
        raise ConfigError("--shards, --manifest and --reduce-range belong to --int8; add --int8 dynamic or static")
    return Int8Options(given.int8, given.shards, given.manifest, given.reduce_range) if given.int8 else None
