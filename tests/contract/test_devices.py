"""Every objective, front end, encoder and head runs on a device that is not the CPU, with few waits for it.

The device is simulated (tests/support/second_device.py). A case trains, saves, loads and trains on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.contract_cases import CASES, ENCODERS, FRONTENDS, HEADS, small
from tests.support.paths import ROOT

PACKED = {"packed": True}
LOG_MEL, WAVEFORM = FRONTENDS["log_mel"], FRONTENDS["waveform_conv"]

ALIGNER = "pretrain/models/synthesis/aligner.py: copy to the host"
STYLE = "pretrain/heads/synthesis.py: tolist"
STEP_WAITS = {
    "pretrain/engines/base.py: copy to the host": "loss and metrics, once per update",
    "pretrain/engines/plain_torch.py: aten::_local_scalar_dense": "gradient norm, once per update",
}
"""Waits of every update: place -> reason."""
RARE_WAITS = {
    "pretrain/self_supervision/deferred_fit.py: aten::_local_scalar_dense": "whether a fit is due, once per update",
    "pretrain/self_supervision/masked_prediction.py: aten::index.Tensor with a mask": "rows for k-means, once per run",
    "pretrain/objectives/time_contrastive.py: aten::index.Tensor with a mask": "rows for k-means, once per run",
    "pretrain/self_supervision/kmeans.py: aten::bincount": "k-means, once per run",
    "pretrain/self_supervision/kmeans.py: aten::nonzero": "k-means, once per run",
    "pretrain/self_supervision/kmeans.py: aten::equal": "k-means, once per run",
    "data_pipeline/labels/seeding.py: tolist": "k-means, once per run",
    "data_pipeline/labels/seeding.py: aten::_local_scalar_dense": "k-means, once per run",
    "pretrain/heads/episode.py: aten::index.Tensor with a mask": "rows for the fit of the classes, once per run",
    "pretrain/heads/classifier.py: tolist": "comparison of the classes with the checkpoint's, once per run",
    "pretrain/heads/reconstruction.py: copy to the host": "rows with masked frames, before the first kernel of a step",
    "pretrain/train_module.py: copy to the host": "targets of masked frames, before the first kernel of a step",
    "pretrain/self_supervision/masking.py: tolist": "numbers of masked frames, before the first kernel of a step",
    "pretrain/heads/separation.py: copy to the host": "rows with parts, before the first kernel of a step",
    "pretrain/models/synthesis/mel_convention.py: tolist": "comparison with the checkpoint's mel, once per run",
    STYLE: "pitch and rate of the segments become words",
    "pretrain/heads/units.py: copy to the host": "numbers of units, before the first kernel of a step",
    ALIGNER: "the best alignment is searched on the host",
    "pretrain/models/encoders/transformer.py: aten::_local_scalar_dense": "data2vec 2.0: span of the visible frames",
    "pretrain/nn/packing.py: tolist": "data2vec 2.0: spans of the visible frames",
}
"""Waits of some objectives, or of few updates."""


def case(
    objective: str, frontend: dict[str, Any], encoder: str = "transformer", packed: bool = False, **values: Any
) -> dict[str, Any]:
    """Returns the config of a case."""
    return {
        "data": {"shards": "none"},
        "objective": CASES[objective],
        "frontend": frontend,
        "encoder": small("encoders", encoder),
        "engine": {"packed": packed},
        **values,
    }


ODD = tuple(CASES)[::2]
ALL_HEADS = {re.sub(r"\W+", "_", name): values for name, values in HEADS.items()}
CASE_CONFIGS: dict[str, dict[str, Any]] = (
    {name: case(name, LOG_MEL if name in ODD else WAVEFORM, packed=name not in ODD) for name in CASES}
    | {f"{encoder}, packed": case("best_rq", LOG_MEL, encoder, packed=True) for encoder in ENCODERS}
    | {"transformer, padded": case("best_rq", WAVEFORM, "transformer")}
    | {f"{name}, packed": case("best_rq", small("frontends", name), packed=True) for name in ("multiscale",)}
    | {"local and global attention": case("best_rq", LOG_MEL, packed=True)}
    | {
        "chunked attention": case("best_rq", LOG_MEL),
        "chunked attention, packed": case("best_rq", LOG_MEL, packed=True),
    }
    | {"every head": case("best_rq", LOG_MEL, heads=ALL_HEADS)}
)
CASE_CONFIGS["local and global attention"]["encoder"] |= {"positions": "rope", "attention": "local_global"}
for name in ("chunked attention", "chunked attention, packed"):
    CASE_CONFIGS[name]["encoder"] |= {"positions": "rope", "attention": "chunked", "chunk_frames": [0, 8, 16]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the results of all cases, from one process."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "cases.json").write_text(json.dumps(CASE_CONFIGS))
    command = [sys.executable, "-m", "tests.support.second_device", folder / "cases.json", folder / "out.json"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def waits(result: dict[str, Any], *phases: str) -> Counter[str]:
    """Returns how often each place waited in these phases, without line numbers."""
    total: Counter[str] = Counter()
    for phase in phases or result["waits"]:
        for place, count in result["waits"].get(phase, {}).items():
            total[re.sub(r":\d+:", ":", place)] += count
    return total


@pytest.mark.parametrize("name", CASE_CONFIGS)
def test_the_second_device_gives_the_losses_of_the_cpu(name: str, results: dict[str, Any]) -> None:
    assert "error" not in results[name], results[name]["error"]
    found, expected = results[name]["found"], results[name]["expected"]
    for part in ("losses", "norms"):
        mine, other = (torch.tensor(side[part], dtype=torch.float64) for side in (found, expected))
        # every head: errors of twenty losses add up
        torch.testing.assert_close(mine, other, rtol=5e-3 if name == "every head" else 3e-3, atol=0)


@pytest.mark.parametrize("name", CASE_CONFIGS)
def test_an_update_waits_for_the_device_at_known_places_only(name: str, results: dict[str, Any]) -> None:
    found = waits(results[name]["found"], *(set(results[name]["found"]["waits"]) - {"checkpoint", "resume"}))
    assert not found.keys() - STEP_WAITS.keys() - RARE_WAITS.keys()
    steps = len(results[name]["found"]["losses"])
    assert all(found[place] <= steps for place in STEP_WAITS)


@pytest.mark.parametrize("name", [name for name in CASE_CONFIGS if name != "data2vec2"])
def test_passes_over_a_fitted_model_never_wait(name: str, results: dict[str, Any]) -> None:
    """Forward and backward passes run ahead of the device; the rows of k-means are collected once per run."""
    found = waits(results[name]["found"], "forward pass", "backward pass")
    once = {place for place, reason in RARE_WAITS.items() if "once per" in reason}
    assert not found.keys() - once - {ALIGNER, STYLE}


def test_planted_faults_are_named_with_file_and_line(tmp_path: Path) -> None:
    """A mask that is left on the CPU, a value read in a forward pass, and a size that depends on values."""
    code = """
import torch
from tests.support import second_device as sd
library = sd.register()
with sd.SecondDevice():
    x = torch.arange(4.0).to(sd.DEVICE)
    try:
        x * torch.ones(4)
    except sd.MixedDevicesError as error:
        print("mixed", error)
    sd.WAITS.enter("forward pass")
    float(x.sum()), x[x > 1], torch.bincount(x.long()), x.cpu(), x.tolist()
print(sum(sd.WAITS.found["forward pass"].values()), *sd.WAITS.found["forward pass"])
try:
    torch.arange(3, device=sd.DEVICE).numpy()
except TypeError as error:
    print("numpy", error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    assert "mixed aten::mul.Tensor: CPU tensors of shapes [(4,)]" in run.stdout
    for operation in ("_local_scalar_dense", "index.Tensor with a mask", "bincount", "copy to the host", "tolist"):
        assert operation in run.stdout
    assert "numpy" in run.stdout
