"""`import auricle`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import auricle
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import save


def test_a_run_is_loaded_with_its_config_and_encodes_audio(tmp_path: Path) -> None:
    save(tmp_path / "run", 2)
    run = auricle.load_run(tmp_path / "run")
    assert (run.step, run.config.objective.name) == (2, "best_rq")
    encoder = auricle.load_encoder(tmp_path / "run")
    wave_T = torch.randn(16_000)
    run.module.eval()
    with torch.no_grad():
        wanted = run.module.model(wave_T[None], torch.tensor([16_000])).layers
    torch.testing.assert_close(encoder.encode(wave_T), torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_a_data_set_yields_every_segment_once(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [sounds([1.5] * 6)])
    reader = auricle.open_dataset(shards, batch_seconds=3, micro_batches=1, min_seconds=1.0, max_seconds=2.0, workers=0)
    steps = reader.steps()
    keys = [key for _ in range(3) for batch in next(steps).batches for key in batch.keys]
    reader.close()
    assert len(set(keys)) == len(keys) == 6


def test_several_folders_are_one_data_set(tmp_path: Path) -> None:
    shards = [write_shards(tmp_path / name, [sounds([1.5] * 2, corpus=name)]) for name in ("a", "b")]
    reader = auricle.open_dataset(shards, batch_seconds=6, micro_batches=1, min_seconds=1.0, max_seconds=2.0, workers=0)
    assert sum(len(batch.keys) for batch in next(reader.steps()).batches) == 4
    reader.close()


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_second="):
        auricle.open_dataset(tmp_path, batch_second=3)


def test_importing_it_is_light_and_a_foreign_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text("raise SystemExit('the foreign package was run')\n")
    program = (
        f"import sys; sys.path.append({str(ROOT)!r}); import auricle\n"
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()\n"
        "try: auricle.load_encoder('x')\n"
        "except ImportError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", env=environment)
    assert "another package called `pretrain`" in done.stdout, done.stderr
