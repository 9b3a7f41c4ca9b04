"""Results of programs: fingerprints, and the commands that go on from them."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.preprocess.job import preprocess
from launch.workers.programs.preprocess import made, next_commands
from tests.support.sounds import many, path_config, write_corpus


def test_a_split_without_a_test_set_has_a_fingerprint(tmp_path: Path) -> None:
    """`split.valid` alone makes no folder `test`."""
    corpus = write_corpus(tmp_path / "corpus", many(8))
    config = path_config(corpus, tmp_path / "out", split={"valid": 0.4}, ray={"num_cpus": 2})
    preprocess(config, progress=False)
    assert not (tmp_path / "out" / "test").exists()
    found = {Path(root).name for root in made(config)}
    assert found
    assert found <= {"train", "valid"}


def test_the_summary_ends_with_commands_that_read_the_shards(tmp_path: Path) -> None:
    whole = next_commands(path_config(tmp_path, tmp_path / "my shards"))
    assert whole[0] == f"auricle shards stats '{tmp_path}/my shards'"
    parts = next_commands(path_config(tmp_path, tmp_path / "out", split={"valid": 0.4}))
    assert parts[1].endswith(f"data.shards={tmp_path}/out/train")
