"""Pitch labels: their definition, and tones of known pitch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.ray_tasks import RayClusterConfig
from data_pipeline.core.schema import ConfigError
from data_pipeline.labels import pitch
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.pitch_targets import label_pitch
from data_pipeline.labels.store import LabelMetadata, file_name
from data_pipeline.shards.records import done_records
from tests.support.tiny_shards import sounds, write_shards


def test_labels_are_steps_of_a_24th_octave() -> None:
    hertz = np.array([50.0, 100.0, 200.0, 101.0, 30.0, 9_000.0])
    labels = pitch.labels_from_f0(hertz, np.array([True] * 6))
    assert labels.tolist() == [1, 25, 49, 25, 1, pitch.CLASSES - 1]
    assert pitch.labels_from_f0(hertz, np.zeros(6, bool)).tolist() == [0] * 6


def test_tones_have_their_pitch_and_silence_none() -> None:
    pytest.importorskip("swift_f0")
    time = np.arange(16_000) / 16_000
    tone = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 12))
    wave = np.concatenate([0.2 * tone, np.zeros(8_000)]).astype(np.float32)
    labels = pitch.pitch_labels()(wave[:-7])
    assert len(labels) == 150
    wanted = int(pitch.labels_from_f0(np.array([150.0]), np.array([True]))[0])
    assert np.abs(labels[10:90].astype(int) - wanted).max() <= 1
    assert (labels[110:] == 0).all()
    assert len(pitch.pitch_labels()(np.zeros(0, np.float32))) == 0


def test_a_shard_is_labelled_once(tmp_path: Path) -> None:
    pytest.importorskip("swift_f0")
    write_shards(tmp_path / "shards", [sounds([0.5, 0.3])])
    config = TargetsConfig(
        shards=str(tmp_path / "shards"), out=str(tmp_path / "out"), features="pitch", ray=RayClusterConfig()
    )
    labels = LabelMetadata(pitch.artefact(), pitch.RATE_HZ, pitch.CLASSES)
    (tmp_path / "out").mkdir()
    (record, *_) = done_records(config.shards)
    frames, voiced = label_pitch(config, record, labels)
    assert frames >= voiced >= 0
    assert frames > 0
    content = (tmp_path / "out" / file_name(record.shard)).read_bytes()
    assert label_pitch(config, record, labels) == (0, 0)
    assert (tmp_path / "out" / file_name(record.shard)).read_bytes() == content


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise pitch.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pitch.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install swift-f0"):
        pitch.artefact()
