"""auricle export: writes a run as a Hugging Face model folder, or as a TorchScript or ONNX graph."""

from __future__ import annotations

from pathlib import Path

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

FORMATS = ("hugging_face", "torchscript", "onnx", "onnx_stream")


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
        "most architectures; onnx_stream: one chunk of a stream, with its states as inputs and outputs (default: "
        "hugging_face)",
    )
    parser.add_argument(
        "--layer", type=int, default=-1, help="torchscript, onnx: the layer that is returned (-1: the last)"
    )
    parser.add_argument("--chunk", type=int, help="onnx_stream: frames per chunk (the first trained length)")
    parser.add_argument("--left", type=int, help="onnx_stream: earlier chunks attended to (the first trained number)")
    parser.add_argument(
        "--head",
        default="",
        help="hugging_face: the CTC head to export too (the only one of a recogniser)",
    )
    given = parser.parse_args(arguments)

    from launch.runs.summary import find_run
    from pretrain.heads.ctc import CTC
    from pretrain.interop import graph_export, stream_export
    from pretrain.interop.hf_export import TOLERANCE, export, load_run

    path = Path(given.run).expanduser()
    module, config, _ = load_run(path if (path / "state.json").is_file() else find_run(given.run))
    if given.to == "hugging_face":
        error, allowed = export(config, module, given.out, given.head), TOLERANCE
    elif given.to == "onnx_stream":
        head = next((head for head in module.heads.values() if isinstance(head, CTC)), None)
        error = stream_export.export_stream(config, module.model, given.out, given.chunk, given.left, head)
        allowed = graph_export.TOLERANCE["onnx"]
    else:
        error = graph_export.export_graph(config, module.model, given.out, given.to, given.layer)
        allowed = graph_export.TOLERANCE[given.to]
    print(f"{given.out}: features of the loaded copy differ by {error:.1e} (allowed: {allowed:.0e})")
    return ExitCode.DONE
