"""MFU: counted FLOPs and peak rates of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import load
from pretrain.config import EngineConfig
from pretrain.profiling.mfu import Utilisation, device_peak_tflops, forward_flop, measure
from tests.support.training import config, run


def test_transformer_flops_equal_those_of_its_matrix_products() -> None:
    """Counts two per multiply-add: mel filters, convolutions, linear layers and attention, fused or not."""
    settings = config(data={"shards": "synthetic", "micro_batches": 4, "min_seconds": 4.0, "max_seconds": 4.0})
    dim, ffn, layers, frames = 32, 64, 2, 99
    filters = 398 * 257 * 80
    subsampling = 198 * 80 * dim * 3 + frames * dim * dim * 3
    positions = (frames + 1) * dim * (dim // 4) * 32
    linear = frames * (dim * dim + layers * (4 * dim * dim + 2 * dim * ffn))
    attention = layers * 2 * frames * frames * dim
    assert forward_flop(settings) == 2 * (filters + subsampling + positions + linear + attention) / 4


@pytest.mark.parametrize(
    ("name", "engine", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", {"precision": "bf16"}, 989.4),
        ("NVIDIA H100 PCIe", {"precision": "bf16"}, 756),
        ("NVIDIA A100-SXM4-80GB", {"precision": "fp32"}, 156),
        ("NVIDIA A100-SXM4-80GB", {"precision": "fp32", "tf32": False}, 19.5),
        ("NVIDIA L40S", {"precision": "fp16"}, 362),
        ("NVIDIA A10G", {"precision": "bf16"}, 70),
        ("NVIDIA B200", {"precision": "fp32"}, 1125),
        ("AMD Instinct MI300X", {"precision": "bf16"}, 1307.4),
        ("Some new thing", {"precision": "bf16"}, 0),
        ("Some new thing", {"precision": "bf16", "peak_tflops": 50.0}, 50),
        ("", {}, 0),
    ],
)
def test_the_peak_rate_depends_on_the_device(name: str, engine: dict[str, Any], tflops: float) -> None:
    assert device_peak_tflops(load(EngineConfig, engine), name) == tflops


def test_mfu_is_the_share_of_the_peak_of_all_devices() -> None:
    assert Utilisation(3e10, 8 * 989e12).share(100_000) == pytest.approx(3e15 / 7.912e15)
    assert measure(config(), "cpu", 1) is None


def test_a_run_on_a_device_with_a_known_peak_logs_mfu(tmp_path: Path) -> None:
    settings = config(2, engine={"name": "torch", "peak_tflops": 0.5})
    run(tmp_path, settings)
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    found = measure(settings, "cpu", 1)
    assert found is not None
    assert row["perf/mfu"] == pytest.approx(found.share(row["perf/audio_seconds_per_second"]))
    assert 0 < row["perf/mfu"] < 1
