"""Frame labels: as good as scikit-learn's, independent of the number of workers, from a single k-means model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.labels import kmeans
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.features import kaldi_mfcc
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.labels.unit_labels import open_labeller
from data_pipeline.shards.records import done_records, read_index
from pretrain.interop.fingerprint import checkpoint_fingerprint
from tests.support.corpora import preprocess_here
from tests.support.corrupt_shards import replace_audio, silent_flac
from tests.support.sounds import many, path_config, write_corpus
from tests.support.tiny_shards import sounds, write_shards

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    root = tmp_path_factory.mktemp("targets")
    preprocess_here(path_config(write_corpus(root / "corpus", many(12, 2.0)), root / "out", shard_mb=0.6))
    return root / "out"


def settings(shards: Path, out: Path, **values: object) -> TargetsConfig:
    given = {"shards": str(shards), "out": str(out), "classes": 8, "rounds": 6, "tolerance": 0.0, **values}
    return load(TargetsConfig, given)


def all_features(shards: Path) -> np.ndarray:
    parts = [
        features for record in done_records(str(shards)) for _, features in kmeans.shard_features(record, kaldi_mfcc)
    ]
    return np.concatenate(parts)


def labels_of(out: Path) -> dict[str, list[int]]:
    tables = [pq.read_table(path) for path in sorted(out.glob("*.labels.parquet"))]
    return {key: row for table in tables for key, row in zip(*table.to_pydict().values(), strict=True)}


def test_inertia_matches_scikit_learn_and_a_resume_gives_the_same_centres(shards: Path, tmp_path: Path) -> None:
    from sklearn.cluster import KMeans

    config = settings(shards, tmp_path / "labels")
    summary = kmeans.make_targets(config)
    frames = all_features(shards)
    theirs = KMeans(8, n_init=4, max_iter=30, random_state=0).fit(frames)
    centres = kmeans.load_tensors((tmp_path / "labels" / kmeans.KMEANS).read_bytes())["centres"]
    mine = kmeans.assign(frames, centres)[1].mean()
    assert mine <= 1.01 * theirs.inertia_ / len(frames)
    assert all(a >= b for a, b in zip(summary.inertia, summary.inertia[1:], strict=False))
    assert LabelMetadata.read(str(tmp_path / "labels")).classes == 8
    keys = [row for record in done_records(str(shards)) for row in read_index(str(shards), record)["key"].to_pylist()]
    labels = labels_of(tmp_path / "labels")
    assert sorted(labels) == sorted(keys)
    assert {len(row) for row in labels.values()} == {198}, "2 s in frames of 25 ms every 10 ms"
    interrupted = settings(shards, tmp_path / "twin", rounds=3)
    kmeans.make_targets(interrupted)
    for path in (*(tmp_path / "twin").glob("*"),):
        if path.is_file():
            path.unlink()  # as if killed after round 3
    again = kmeans.make_targets(settings(shards, tmp_path / "twin"))
    assert len(again.inertia) == 6
    assert labels_of(tmp_path / "twin") == labels
    assert again.artefact == summary.artefact


def test_one_round_equals_a_lloyd_iteration(shards: Path) -> None:
    from sklearn.cluster import KMeans

    frames = all_features(shards)
    centres = frames[:: len(frames) // 8][:8]
    parts = [kmeans.accumulate(record, kaldi_mfcc, centres) for record in done_records(str(shards))]
    mine = sum(part[0] for part in parts) / sum(part[1] for part in parts)[:, None]
    theirs = KMeans(8, init=centres, n_init=1, max_iter=1).fit(frames).cluster_centers_
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=5e-3)


def test_another_data_set_can_use_the_same_centres_and_changed_settings_are_rejected(
    shards: Path, tmp_path: Path
) -> None:
    first = kmeans.make_targets(settings(shards, tmp_path / "train", rounds=2))
    second = kmeans.make_targets(settings(shards, tmp_path / "valid", rounds=2, kmeans=str(tmp_path / "train")))
    assert first.artefact == second.artefact
    with pytest.raises(ConfigError, match="classes=9 here, 8 there"):
        kmeans.make_targets(settings(shards, tmp_path / "train", rounds=2, classes=9))
    with pytest.raises(ConfigError, match="holds no kmeans"):
        kmeans.make_targets(settings(shards, tmp_path / "other", kmeans=str(tmp_path)))


def test_labels_made_with_other_weights_are_rejected(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path / "labels", rounds=1)
    kmeans.make_targets(config, weights="one")
    assert kmeans.all_labelled(config, "one")
    assert kmeans.all_labelled(config), "labels stay usable after the model is deleted"
    with pytest.raises(ConfigError, match="weights='two' here, 'one' there"):
        kmeans.make_targets(config, weights="two")
    with pytest.raises(ConfigError, match="holds labels of other settings"):
        kmeans.all_labelled(config, "two")
    other = settings(shards, tmp_path / "other", rounds=1, kmeans=str(tmp_path / "labels"))
    kmeans.make_targets(other)
    centres = kmeans.load_tensors((tmp_path / "labels" / kmeans.KMEANS).read_bytes())["centres"]
    (tmp_path / "labels" / kmeans.KMEANS).write_bytes(kmeans.save_tensors({"centres": 2 * centres}))
    with pytest.raises(ConfigError, match="centres="):
        kmeans.make_targets(other)


@pytest.mark.parametrize(
    ("claimed", "refused"),
    [(16_000, ""), (16_001 + 60 * 16_000, "its index"), (2 * 3600 * 16_000, "3600 s"), (1 << 33, "n_samples")],
)
def test_the_index_length_is_checked_against_the_audio(tmp_path: Path, claimed: int, refused: str) -> None:
    root = write_shards(tmp_path / "shards", [sounds([1.0])])
    replace_audio(root, "shard-0000", silent_flac(60), n_samples=claimed)
    [record] = done_records(str(root))
    found = kmeans.shard_features(record, kaldi_mfcc)
    if refused:
        with pytest.raises(ValueError, match=refused):
            list(found)
    else:
        assert [features.shape for _, features in found] == [(98, 39)], "the index says one second, the file has sixty"


def test_every_file_of_sharded_weights_is_fingerprinted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [Path(name).name for name in checkpoint_fingerprint(str(tmp_path))] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="a pickle is never opened"):
        checkpoint_fingerprint(str(tmp_path))


def test_single_recordings_get_the_labels_of_the_shards_at_a_lower_rate(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path / "labels", rounds=2, rate_hz=25, silence_db=20.0)
    extractor = functools.partial(kaldi_mfcc, config.rate_hz, config.silence_db)
    summary = kmeans.make_targets(config, extractor)
    assert summary.rate_hz == LabelMetadata.read(config.out).rate_hz == 25
    label, stored = open_labeller(config.out), labels_of(tmp_path / "labels")
    for record in done_records(str(shards)):
        for key, wave in kmeans.shard_waves(record):
            assert label(wave).tolist() == stored[key]
    with pytest.raises(ConfigError, match=r"silence_db=0\.0 here, 20.0 there"):
        kmeans.make_targets(settings(shards, tmp_path / "labels", rounds=2, rate_hz=25), extractor)
    with pytest.raises(ConfigError, match=r"centres are of 25 Hz, not 100; set rate_hz=25"):
        kmeans.make_targets(settings(shards, tmp_path / "other", kmeans=config.out))
