"""Damaged files of kept batches: the error names the file and no exception of a parser reaches the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.json_object import DamagedFileError
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.batch_dump import load_batches, save_batches
from tests.support.contract_cases import batch


@pytest.mark.parametrize("change", ["torn", "list", "no why", "no keys", "labels a list", "tensors torn", "no tensors"])
def test_a_damaged_file_of_a_kept_batch_is_named(tmp_path: Path, change: str) -> None:
    run = RunFolder(tmp_path)
    run.claim()
    kept = save_batches(run, 0, StepContext(0, 3), [batch()], "a spike")
    assert kept is not None
    assert load_batches(kept)[2] == "a spike"
    file, tensors = kept / "rank_0.json", kept / "rank_0.safetensors"
    values = json.loads(file.read_bytes())
    if change == "torn":
        file.write_bytes(file.read_bytes()[:30])
    elif change == "tensors torn":
        tensors.write_bytes(tensors.read_bytes()[:300])
    elif change == "no tensors":
        tensors.unlink()
    else:
        if change == "no why":
            del values["why"]
        elif change == "no keys":
            del values["batches"][0]["keys"]
        elif change == "labels a list":
            values["batches"][0]["labels"] = []
        file.write_text(json.dumps([values] if change == "list" else values))
    with pytest.raises(DamagedFileError, match=rf"{file}: .* replay the kept batches of another step"):
        load_batches(kept)
