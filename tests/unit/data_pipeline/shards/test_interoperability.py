"""Shards are readable by lhotse's tar reader (for plain tar and webdataset see test_writer)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.shards.records import done_records, read_index
from tests.support.corpora import preprocess_here
from tests.support.sounds import many, path_config, write_corpus


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("others")
    preprocess_here(path_config(write_corpus(root / "corpus", many(6, 1.0)), root / "out", shard_mb=0.2))
    return root / "out"


def test_lhotse_reads_audio_and_metadata_pairs_from_the_tar(shards: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="needs lhotse")
    from lhotse.shar.readers.tar import iterate_tarfile_pairwise

    for record in done_records(str(shards)):
        rows = read_index(str(shards), record).to_pylist()
        with tarfile.open(shards / record.shard) as tar:
            pairs = list(iterate_tarfile_pairwise(tar))
        assert [str(audio_path) for (_, audio_path), _ in pairs] == [f"{row['key']}.flac" for row in rows]
        for ((audio, _), (meta, _)), row in zip(pairs, rows, strict=True):
            assert json.loads(meta)["n_samples"] == row["n_samples"]
            recording = lhotse.Recording.from_bytes(audio, row["key"])
            assert (recording.sampling_rate, recording.num_samples) == (16_000, row["n_samples"])
            ours, _ = soundfile.read(io.BytesIO(audio), dtype="float32")
            np.testing.assert_array_equal(recording.load_audio()[0], ours)
