"""Two ranks and a shard modified after its check: both ranks end, or both continue without it."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from tests.support.faults.key_runs import prepare, start
from tests.support.tiny_shards import sounds, write_shards

STEPS = 12


def altered(tmp_path: Path) -> Path:
    rng = random.Random(0)
    everything = sounds([rng.uniform(0.6, 2.0) for _ in range(60)])
    root = write_shards(tmp_path / "shards", [everything[i::3] for i in range(3)])
    shard = root / "shard-0001.tar"
    data = bytearray(shard.read_bytes())
    for at in range(600, len(data), 50):
        data[at] ^= 0xFF
    shard.write_bytes(data)
    return root


def ends(folder: Path) -> list[tuple[int, str]]:
    """Returns exit code and stderr of both ranks; fails if one hangs."""
    processes = start(folder, 2)
    try:
        return [(p.wait(timeout=200), (p.stderr.read() if p.stderr else b"").decode()) for p in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError("a rank hangs") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.timeout(400)
def test_a_modified_shard_ends_both_ranks_or_is_skipped_by_both(tmp_path: Path) -> None:
    root = altered(tmp_path)
    strict = prepare(tmp_path, "strict", root, {"name": "torch"}, STEPS)
    found = ends(strict)
    assert all(code not in (0, None) for code, _ in found)
    assert any("shard-0001.tar" in said and "Traceback" not in said for _, said in found)

    lenient = prepare(tmp_path, "lenient", root, {"name": "torch"}, STEPS)
    config = json.loads((lenient / "config.json").read_text())
    config["data"]["on_bad_shard"] = "skip"
    (lenient / "config.json").write_text(json.dumps(config))
    assert [code for code, _ in ends(lenient)] == [0, 0]
    rows = read_rows(lenient / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["data/skipped_segments"] for row in rows) > 0
