"""Episodes: what they hold, the keys of their draws, ranks and resumes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import PART, QUERY, SUPPORT, WAY, Batch
from data_pipeline.loader.reader import open_reader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.episodes import STEPS, LabelledRows
from tests.support.tiny_shards import Sound, write_shards

CLASSES, SPEAKERS, TAKES = 6, 4, 3
"""Languages stand for the classes of the shards below."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sounds = [
        Sound(f"c{c}-s{s}-{take}", 3200 + 160 * take, language=f"class {c}", speaker=f"speaker {s}")
        for c in range(CLASSES)
        for s in range(SPEAKERS)
        for take in range(TAKES)
    ]
    return write_shards(tmp_path_factory.mktemp("episodes"), [sounds[::2], sounds[1::2]])


def config(shards: Path, **more: Any) -> DataConfig:
    episodes = {"label": "language", "ways": 3, "shots": [1, 2], "queries": 2, **more.pop("episodes", {})}
    given = {"shards": [str(shards)], "batch_seconds": 2.0, "min_seconds": 0.0, "max_seconds": 0.5, "workers": 0}
    return load(DataConfig, {**given, "micro_batches": 2, "episodes": episodes, **more})


def batches(settings: DataConfig, steps: int, rank: int = 0, world: int = 1, seed: int = 0) -> list[Batch]:
    reader = open_reader(settings, seed, rank, world)
    try:
        found = reader.steps()
        return [batch for _ in range(steps) for batch in next(found).batches]
    finally:
        reader.close()


def test_support_and_queries_have_the_same_classes_and_other_speakers(shards: Path) -> None:
    seen = set()
    for batch in batches(config(shards), 8):
        languages, speakers = batch.labels["language"], batch.labels["speaker"]
        rows = list(zip(batch.labels[PART], batch.labels[WAY], languages, speakers, strict=True))
        given, asked = ([row for row in rows if row[0] == part] for part in (SUPPORT, QUERY))
        classes = {way: language for _, way, language, _ in given}
        assert set(classes) == {"0", "1", "2"}
        assert len(set(classes.values())) == 3
        assert len(given) in (3, 6)
        assert all(classes[way] == language for _, way, language, _ in asked)
        assert not {row[3] for row in given} & {row[3] for row in asked}
        assert [row[0] for row in rows] == [SUPPORT] * len(given) + [QUERY] * len(asked)
        seen.add(len(given))
        assert set(batch.keys) == {key for key in batch.keys if key.startswith("c")}
    assert seen == {3, 6}


def test_draws_depend_on_seed_step_and_micro_batch_alone(shards: Path) -> None:
    settings = config(shards)
    whole = [batch.keys for batch in batches(settings, 3)]
    ranks = [[batch.keys for batch in batches(settings, 3, rank, 2)] for rank in range(2)]
    assert [keys for pair in zip(*ranks, strict=True) for keys in pair] == whole
    assert [batch.keys for batch in batches(replace(settings, workers=1), 3)] == whole
    assert [batch.keys for batch in batches(settings, 3, seed=1)] != whole
    reader = open_reader(settings, 0, 0, 1)
    steps = reader.steps()
    after = [next(steps) for _ in range(2)][-1].after
    resumed = open_reader(settings, 0, 0, 1)
    assert [batch.keys for batch in next(resumed.steps(after)).batches] == whole[4:]
    assert reader.plan.layout(0).steps == STEPS
    with pytest.raises(ConfigError, match=r"data\.episodes\.label=language: micro-batches are episodes"):
        reader.plan.place(0, 0)
    assert [one.row_n.tolist() for one in reader.plan.step(1, 0)] != [
        one.row_n.tolist() for one in reader.plan.step(0, 0)
    ]
    assert open_reader(config(shards, episodes={"queries": 1}), 0, 0, 1).plan_hash != reader.plan_hash


def test_speakers_as_classes_may_be_in_both_parts(shards: Path) -> None:
    [batch] = batches(config(shards, micro_batches=1, episodes={"label": "speaker", "ways": 2, "shots": [3]}), 1)
    pairs = list(zip(batch.labels[PART], batch.labels["speaker"], strict=True))
    assert {speaker for part, speaker in pairs if part == SUPPORT} == {s for part, s in pairs if part == QUERY}
    assert not set(batch.keys[:6]) & set(batch.keys[6:])


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ({"ways": 7}, r"data\.episodes\.ways=7.*shots=1.*6 classes, 4 speakers and 72 recordings.*label=language"),
        ({"shots": [1, 10]}, r"shots=10: too few classes have 10 recordings and one more by another speaker"),
        ({"label": "word"}, r"word.*no sample has such a label"),
    ],
)
def test_too_few_classes_shots_or_labels_are_refused_with_what_there_is(
    shards: Path, episodes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(config(shards, episodes=episodes), 1)


def test_every_class_is_drawn_about_as_often() -> None:
    rows = LabelledRows(np.repeat(np.arange(10), 20), np.tile(np.arange(20), 10))
    counts = np.zeros(10)
    for number in range(400):
        drawn = rows.draw(5, 1, 1, np.random.default_rng(number))
        np.add.at(counts, drawn.support_WK[:, 0] // 20, 1)
    assert counts.sum() == 2000
    assert counts.min() > 160
    assert counts.max() < 240
