"""Data and recipe of a fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.shards.records import done_records
from pretrain.adaptation.config import FinetuneConfig
from pretrain.adaptation.finetune import find_splits, longest_seconds, recipe, write_shards
from pretrain.evaluate.manifest import Utterance
from tests.support.sounds import index_rows, sound
from tests.support.tiny_shards import sounds
from tests.support.tiny_shards import write_shards as write_tiny_shards

HEADER = "path\tspeaker\ttext\tcorpus\tsplit\n"


def settings(folder: Path, **values: object) -> FinetuneConfig:
    given = {"checkpoint": "none", "random_weights": True, "corpora": "c", "manifest": str(folder / "manifest.tsv")}
    return load(FinetuneConfig, given | values)


def manifest(folder: Path, *rows: str) -> None:
    """Writes a manifest of these rows and a sound for each path."""
    for row in rows:
        soundfile.write(folder / row.partition("\t")[0], sound(row, 0.3), 16_000)
    (folder / "manifest.tsv").write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")


def test_only_texts_in_the_symbols_of_the_recogniser_are_used(tmp_path: Path) -> None:
    manifest(
        tmp_path, "a.wav\tA\tone\tc\ttrain", "b.wav\tB\t七\tc\ttrain", "c.wav\tC\ttwo\tc\ttest", "d.wav\tD\tx\te\ttest"
    )
    found = find_splits(settings(tmp_path))
    assert [u.speaker for u in found.train] == ["A"]
    assert [u.speaker for u in found.test] == ["C"]


@pytest.mark.parametrize(
    ("row", "error", "said"),
    [
        ("b.wav\tA\ttwo\tc\ttest", ValueError, "A"),
        ("b.wav\tB\t七\tc\ttest", ConfigError, r"manifest=.*splits train and test"),
    ],
)
def test_a_speaker_in_both_splits_and_a_split_without_text_are_refused(
    row: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    manifest(tmp_path, "a.wav\tA\tone\tc\ttrain", row)
    with pytest.raises(error, match=said):
        find_splits(settings(tmp_path))


def test_each_utterance_becomes_one_segment_with_its_text_and_bad_ones_are_counted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound("a", 1.5), 16_000)
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16_000)
    utterances = [Utterance(str(tmp_path / f"{n}.wav"), n, speaker=n, text=f"It's {n}!", corpus="c") for n in "ab"]
    shards, unusable = write_shards(utterances, settings(tmp_path), tmp_path / "out")
    assert unusable == 1
    assert [(row["speaker"], row["n_samples"]) for row in index_rows(shards)] == [("a", 24_000)]
    assert write_shards(utterances, settings(tmp_path), tmp_path / "out") == (shards, 1)
    assert len(done_records(str(shards))) == 1


def test_the_longest_segment_is_rounded_up_and_limited(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path, [sounds([0.5, 1.2345]), sounds([0.7], corpus="b")])
    assert longest_seconds(str(tmp_path), 30.0) == 1.24
    assert longest_seconds(str(tmp_path), 1.0) == 1.0


def test_the_users_fields_come_last(tmp_path: Path) -> None:
    made = recipe(settings(tmp_path, steps=50, out="runs/mine"), "shards", 3.5, ["optimizer.lr=1"])
    assert made[-1] == "optimizer.lr=1"
    assert {"name=mine", "runs=runs", "train.steps=50", "schedule.warmup_steps=5", "data.max_seconds=3.5"} <= set(made)
    assert "init=" in made  # random weights
    assert "objective.frozen_steps=0" in made
