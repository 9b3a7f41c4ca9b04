"""Checks of a run's config against its data: frame labels that a head reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.text.artefact import TokensConfig, make_tokens
from launch.workers.build import build, require_fitting_labels
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from tests.support.foreign_tars import write_foreign


def with_pitch(folder: Path, **targets: str) -> Config:
    """Returns the config of a run whose head reads pitch labels."""
    make_tokens(load(TokensConfig, {"shards": "s", "out": str(folder / "tokens")}), ["abc"])
    values: dict[str, Any] = {
        "data": {"shards": "none", "tokens": {"text": str(folder / "tokens")}, "targets": targets},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer"},
        "objective": {"name": "none"},
        "heads": {"voice": {"name": "synthesis", "vocabulary": 3, "pitch": "f0"}},
    }
    return load(Config, values)


def test_frame_labels_of_a_head_must_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heads\.voice\.pitch=f0: .*set data\.targets\.f0=FOLDER"):
        require_fitting_labels(with_pitch(tmp_path))


@pytest.mark.parametrize(
    ("rate_hz", "said"), [(50, r"heads\.voice\.pitch=f0: needs 100 Hz, and .* have 50 Hz"), (100, "")]
)
def test_frame_labels_of_a_head_must_have_its_rate_and_any_number_of_classes(
    rate_hz: int, said: str, tmp_path: Path
) -> None:
    LabelMetadata("f0", rate_hz, 5_000).write(str(tmp_path / "labels"))
    config = with_pitch(tmp_path, f0=str(tmp_path / "labels"))
    if not said:
        require_fitting_labels(config)
        return
    with pytest.raises(ConfigError, match=said):
        require_fitting_labels(config)


def characters(symbols: str, **data: Any) -> Config:
    """Returns the config of a run whose CTC head writes characters."""
    values: dict[str, Any] = {
        "data": {"shards": "none", "labels": ["text"]} | data,
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer"},
        "objective": {"name": "none"},
        "heads": {"task": {"name": "ctc", "symbols": symbols}},
    }
    return load(Config, values)


def test_crops_of_every_segment_are_refused_beside_a_head_on_characters() -> None:
    require_fitting_labels(characters("ab"))
    with pytest.raises(
        ConfigError, match=r"data\.crop_to_shortest=true: .*heads\.task.*set data\.crop_to_shortest=false"
    ):
        require_fitting_labels(characters("ab", crop_to_shortest=True))


def test_symbols_of_another_alphabet_are_refused_for_tars_without_an_index(tmp_path: Path) -> None:
    shards = str(write_foreign(tmp_path / "tars", tars=1, per_tar=6))
    config = characters("αβγ", shards=shards, reader="webdataset", workers=0, micro_batches=1)
    with pytest.raises(ConfigError, match=r"heads\.task\.symbols='αβγ': has no character of \d+ texts, such as 'words"):
        build(config, DistributedContext(0, 1, 0, "cpu"), RunFolder(str(tmp_path / "run")))
