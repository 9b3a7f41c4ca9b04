"""auricle export --int8: an ONNX graph with 8-bit products, written only if it is as accurate as the fp32 graph."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels.features import Extractor
from data_pipeline.labels.kmeans import shard_features
from data_pipeline.shards.records import done_records
from pretrain.checkpointing.weights import LoadedCheckpoint
from pretrain.compression import quantization
from pretrain.compression.attention_fusion import fuse_attention
from pretrain.compression.quantization import Lost, Mode
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.graph_encoder import open_graph_encoder
from pretrain.evaluate.metrics import NON_SILENCE
from pretrain.interop.graph_export import export_graph, open_graph

SECONDS = 120.0
"""Audio that is read for calibration, and as much again for the comparison."""
MOST_SECONDS = 20.0
"""Audio that is read of one segment."""
POINTS_LOST = 0.01
"""Largest loss of the accuracy of a probe, and largest rise of a word error rate."""


class Int8Options(NamedTuple):
    """Settings of quantisation.

    manifest: also compare probes of phones, or the error rate of an edge recogniser, on it; None: do not.
    reduce_range: 7 bits for weights.
    """

    mode: Mode
    shards: str
    manifest: str | None = None
    reduce_range: bool = False


def export_int8(found: LoadedCheckpoint, out: Path, layer: int, options: Int8Options) -> str:
    """Writes model.onnx and features.json; returns one sentence on the loss of accuracy.

    Args:
        found: the run.
        out: folder to write; must not exist.
        layer: layer of the graph's features; -1: the last.
        options: settings of quantisation.

    Raises:
        ConfigError: `out` exists, the shards hold too little audio, the run cannot be exported, or the INT8 graph is
            less accurate than allowed; nothing is written then.
    """
    import onnx

    with new_folder(out) as small, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        waves = read_waves(options.shards, 2 * SECONDS)
        calibration, compared = waves[::2], waves[1::2]
        exact = Path(scratch) / "fp32"
        export_graph(found.config, found.module.model, exact, "onnx", layer)
        files = [folder / "model.onnx" for folder in (exact, small)]
        graph = onnx.load(files[0])
        nodes = quantization.linear_products(graph, found.module.model)
        fused, source = onnx.load(files[0]), Path(scratch) / "fused.onnx"
        attentions = fuse_attention(fused)
        onnx.save(fused, source)
        reduce_range = options.reduce_range or not quantization.has_vnni()
        quantization.quantize(
            source, files[1], nodes=nodes, mode=options.mode, waves=calibration, reduce_range=reduce_range
        )
        opened = [open_graph(file, threads=1) for file in files]
        lost = quantization.lost(opened[0], opened[1], compared)
        quantization.require_accurate(
            lost, lambda: quantization.worst_block(files[0], graph, nodes, options.mode, waves[:8], reduce_range)
        )
        shutil.copy(exact / "features.json", small)
        points = None
        if options.manifest is not None:
            points = probe_loss([open_graph_encoder(folder) for folder in (exact, small)], options.manifest)
        sizes = [file.stat().st_size / 1e6 for file in files]
        described = json.loads((exact / "features.json").read_text(encoding="utf-8"))
        described["int8"] = _description(options.mode, reduce_range, (len(nodes), attentions), lost, points)
        (small / "features.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    probes = "" if points is None else f", probes of phones lose {100 * points:.1f} points"
    return (
        f"{100 * lost.units:.1f} % of the frames change their cluster, features differ by {100 * lost.error:.1f} %"
        f"{probes}; {sizes[0]:.1f} → {sizes[1]:.1f} MB"
    )


def probe_loss(encoders: Sequence[FrozenEncoder], manifest: str) -> float:
    """Returns the accuracy that probes of phones lose on the validation speakers.

    Args:
        encoders: in fp32 and in INT8.
        manifest: of labelled speech.

    Raises:
        ConfigError: they lose more than POINTS_LOST.
    """
    from pretrain.evaluate.config import EvaluateConfig
    from pretrain.evaluate.evaluator import evaluate

    config = EvaluateConfig(checkpoint="fp32,int8", manifest=manifest, seeds=1, baselines=False, ask="valid")
    rows = [row for row in evaluate(config, lambda line: None, encoders) if row.measure == NON_SILENCE]
    points = rows[0].value - rows[1].value
    if not points <= POINTS_LOST:
        raise ConfigError(
            f"--int8: probes of phones lose {100 * points:.1f} points (allowed: {100 * POINTS_LOST:.0f}), "
            f"{100 * rows[0].value:.1f} → {100 * rows[1].value:.1f}; take --int8 dynamic, or calibrate on more audio"
        )
    return points


def read_waves(shards: str, seconds: float) -> list[Tensor]:
    """Returns the first segments of a shard folder, (T,) each, of about `seconds` in all; of long ones the beginning.

    Raises:
        ConfigError: the folder has no shards, or fewer than two segments.
        ValueError: a record is damaged.
    """
    try:
        records = done_records(shards)
    except ConfigError as error:
        raise ConfigError(f"--shards {shards}: {error}") from None
    found: list[Tensor] = []
    total = 0
    for record in records:
        for _, wave in shard_features(record, _samples):
            found.append(torch.from_numpy(np.asarray(wave))[: int(MOST_SECONDS * SAMPLE_RATE)])
            total += len(found[-1])
            if total >= seconds * SAMPLE_RATE:
                return found
    if len(found) < 2:
        raise ConfigError(
            f"--shards {shards}: has {len(found)} segments; INT8 is calibrated and checked on two or more"
        )
    return found


def _samples() -> Extractor:
    return Extractor(lambda wave: wave, SAMPLE_RATE)


def _description(
    mode: Mode, reduce_range: bool, changed: tuple[int, int], lost: Lost, points: float | None
) -> dict[str, str | int | float | None]:
    return {
        "mode": mode,
        "reduce_range": reduce_range,
        "products": changed[0],
        "fused_attentions": changed[1],
        "frames_that_change_cluster": lost.units,
        "relative_error": lost.error,
        "probe_points_lost": points,
    }
