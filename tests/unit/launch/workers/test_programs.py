"""Fingerprints of the results of programs."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.preprocess.job import preprocess
from launch.workers.programs.preprocess import made
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
