"""auricle export --to edge: a streaming graph, its description with checksums, and a program that runs it."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError
from launch.workflows.quantized_export import POINTS_LOST, SECONDS, Int8Options, probe_loss, read_waves
from pretrain.checkpointing.weights import LoadedCheckpoint
from pretrain.compression import quantization
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import find_manifest, labelled_parts, read_audio, read_manifest
from pretrain.heads.ctc import CTC
from pretrain.interop import stream_export, stream_program
from pretrain.interop.graph_export import Run
from pretrain.recognition.error_rates import errors, written

MODEL, DESCRIPTION = "model.onnx", "edge.json"


def export_edge(
    found: LoadedCheckpoint,
    out: Path,
    chunk: int | None,
    left: int | None,
    int8: Int8Options | None,
    head: CTC | None,
) -> str:
    """Writes model.onnx, edge.json and run.py; returns one sentence on the loss of accuracy.

    Args:
        found: the run.
        out: folder to write.
        chunk: frames per chunk; None: the first trained.
        left: earlier chunks attended to; None: the first limited number that was trained.
        int8: how to quantise; None: fp32.
        head: a CTC head of the run that makes the package a recogniser; None: it gives features.

    Raises:
        ConfigError: `out` exists, the model cannot stream (with the fields to set), or INT8 loses too much, of the
            features or of the task that `int8.manifest` is for.
    """
    with new_folder(out) as package, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        waves = read_waves(int8.shards, 2 * SECONDS) if int8 else []
        streaming = Path(scratch) / "stream"
        error = stream_export.export_stream(
            found.config, found.module.model, streaming, chunk=chunk, left_chunks=left, head=head
        )
        described = json.loads((streaming / stream_export.DESCRIPTION).read_text(encoding="utf-8"))
        graph, lost = streaming / stream_export.GRAPH, f"features of the loaded graph differ by {error:.1e}"
        if int8 is None:
            _assemble(package, graph, described, "fp32")
        else:
            exact, quantized = Path(scratch) / "fp32", Path(scratch) / "int8.onnx"
            exact.mkdir()
            _assemble(exact, graph, described, "fp32")
            described["int8"] = _quantize(graph, quantized, found, int8)
            _assemble(package, quantized, described, "int8")
            loss = quantization.lost(streamed(exact), streamed(package), waves[1::2])
            quantization.require_accurate(loss, lambda: "the streaming graph; export --to onnx --int8 names the part")
            shares = 100 * loss.units, 100 * loss.error
            lost = f"{shares[0]:.1f} % of the frames change their cluster, features differ by {shares[1]:.1f} %"
            if int8.manifest is not None:
                lost += f", {require_accurate_task(exact, package, int8.manifest)}"
        size = (package / MODEL).stat().st_size / 1e6
    return f"{lost}; {size:.1f} MB"


def require_accurate_task(exact: Path, small: Path, manifest: str) -> str:
    """Returns what the INT8 package loses on the validation speakers of a manifest, in words.

    A recogniser is judged by the word error rate of its greedy texts, features by probes of phones.

    Raises:
        ConfigError: it loses more than POINTS_LOST, or the manifest has no such speech.
    """
    about = json.loads((small / DESCRIPTION).read_text(encoding="utf-8"))
    symbols, rate_hz = about["symbols"], about["frames_per_second"]
    if not symbols:
        runs = {"fp32": streamed(exact), "int8": streamed(small)}
        encoders = [FrozenEncoder(name, functools.partial(_layer, run), rate_hz) for name, run in runs.items()]
        return f"probes of phones lose {100 * probe_loss(encoders, manifest):.1f} points"
    _, valid = labelled_parts(
        read_manifest(find_manifest(manifest)), (), "valid", lambda u: bool(written(u.text, symbols))
    )
    if not valid:
        raise ConfigError(f"--manifest {manifest}: no text in the split valid, on which the recogniser is compared")
    references, waves = [written(u.text, symbols) for u in valid], [read_audio(u) for u in valid]
    before, after = (errors(folder.name, references, texts_of(folder, waves)).wer for folder in (exact, small))
    if not after - before <= POINTS_LOST:
        raise ConfigError(
            f"--int8: the word error rate rises by {100 * (after - before):.1f} points (allowed: "
            f"{100 * POINTS_LOST:.0f}), {100 * before:.1f} → {100 * after:.1f}; train the last updates with "
            "engine.fake_int8, or export in fp32"
        )
    return f"WER {100 * before:.1f} → {100 * after:.1f} %"


def _layer(run: Run, wave_T: Tensor) -> Tensor:
    """Returns the features of one recording, (1, F, D)."""
    return run(wave_T[None])


def texts_of(folder: Path, waves: Sequence[Wave]) -> list[str]:
    """Returns the texts of a package that is a recogniser, computed chunk by chunk."""
    stream, found = stream_program.Stream(folder), []
    for wave_T in track(waves, "recognising", transient=True):
        stream.reset()
        text = stream_program.Text(stream.about["symbols"])
        for outputs in itertools.chain(stream.push(wave_T), stream.finish()):
            text.add(outputs["log_probs"])
        found.append(text.text)
    return found


def _quantize(source: Path, target: Path, found: LoadedCheckpoint, int8: Int8Options) -> dict[str, Any]:
    """Writes the INT8 graph; returns its part of the description."""
    import onnx

    nodes = quantization.linear_products(onnx.load(source), found.module.model)
    reduce_range = int8.reduce_range or not quantization.has_vnni()
    quantization.quantize(source, target, nodes=nodes, mode="dynamic", waves=[], reduce_range=reduce_range)
    return {"mode": "dynamic", "reduce_range": reduce_range, "products": len(nodes)}


def _assemble(folder: Path, graph: Path, described: dict[str, Any], precision: str) -> None:
    """Writes a package around a graph."""
    shutil.copy(graph, folder / MODEL)
    shutil.copy(stream_program.__file__, folder / stream_export.PROGRAM)
    sums = {name: sha256_of(folder / name) for name in (MODEL, stream_export.PROGRAM)}
    about = described | {"format": "edge", "precision": precision, "sha256": sums}
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def streamed(folder: Path) -> Run:
    """Returns the package as a function from (1, T) audio to (1, F, D) features, computed chunk by chunk."""
    stream = stream_program.Stream(folder)

    def run(wave_BT: Tensor) -> Tensor:
        stream.reset()
        parts = [found["features"] for found in stream.push(wave_BT[0].numpy())]
        parts += [found["features"] for found in stream.finish()]
        return torch.from_numpy(np.concatenate(parts))[None]

    return run
