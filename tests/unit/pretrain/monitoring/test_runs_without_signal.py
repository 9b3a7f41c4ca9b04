"""Runs that cannot learn end as unhealthy: tasks without targets, silent audio, segments that are too short."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch, Cursor, Step
from data_pipeline.sampling.plan import make_plan
from launch.workers.build import require_fitting_labels
from pretrain.monitoring import detectors
from pretrain.monitoring.detection import Silence, explained
from pretrain.monitoring.detectors import Finding
from pretrain.monitoring.health_monitor import UnhealthyError
from pretrain.monitoring.observation import silent_segments
from pretrain.monitoring.tag_descriptions import description
from pretrain.train_module import build_model, least_samples, open_run_reader
from tests.support.catalogs import catalogue_of, reader_config
from tests.support.planted_failures import BEST_RQ, DATA2VEC, WAV2VEC2, config, events, run
from tests.support.synthetic_reader import SyntheticReader
from tests.support.tiny_shards import sounds, write_shards

HUBERT: dict[str, Any] = {"name": "hubert", "units": 8, "projection_dim": 16}
DATA = {"shards": "x", "micro_batches": 4}
CTC = {"text": {"name": "ctc", "label": "text"}}


class Changed(SyntheticReader):
    """Synthetic speech; subclasses change every batch."""

    def change(self, batch: Batch, step: int) -> Batch:
        raise NotImplementedError

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        for number, step in enumerate(super().steps(cursor)):
            yield dataclasses.replace(step, batches=tuple(self.change(batch, number) for batch in step.batches))


class OneFrame(Changed):
    """Clips of 1,000 samples: one frame at 25 Hz, which cannot be both masked and visible."""

    def change(self, batch: Batch, step: int) -> Batch:
        return dataclasses.replace(batch, wave_BT=batch.wave_BT[:, :1000], lengths_B=torch.tensor([1000, 1000]))


class Silent(Changed):
    """All-zero audio."""

    def change(self, batch: Batch, step: int) -> Batch:
        return dataclasses.replace(batch, wave_BT=torch.zeros_like(batch.wave_BT))


class Constant(Changed):
    """Constant audio, as of a channel with a DC offset and no signal."""

    def change(self, batch: Batch, step: int) -> Batch:
        inside = torch.arange(batch.wave_BT.shape[1]) < batch.lengths_B[:, None]
        return dataclasses.replace(batch, wave_BT=0.3 * inside.float())


class SilentFrom20(Changed):
    """Speech first, silence from update 20 on."""

    def change(self, batch: Batch, step: int) -> Batch:
        return batch if step < 20 else dataclasses.replace(batch, wave_BT=torch.zeros_like(batch.wave_BT))


class HalfText(Changed):
    """Text in every other update."""

    def change(self, batch: Batch, step: int) -> Batch:
        return dataclasses.replace(batch, labels={"text": ("a word" if step % 2 else "",) * 2})


class MostTextsTooLong(Changed):
    """Three of four texts have more characters than their segment has frames."""

    def change(self, batch: Batch, step: int) -> Batch:
        return dataclasses.replace(batch, labels={"text": ("a word" if step % 2 else 500 * "a", 500 * "a")})


@pytest.mark.parametrize("objective", [BEST_RQ, WAV2VEC2, DATA2VEC, HUBERT], ids=lambda given: str(given["name"]))
def test_clips_without_a_target_stop_the_run(tmp_path: Path, objective: dict[str, Any]) -> None:
    with pytest.raises(UnhealthyError, match=r"'objective' had no target in 5 updates in a row.*data\.min_seconds"):
        run(tmp_path, config(120, objective), reader=OneFrame)
    assert [(event["step"], event["since"]) for event in events(tmp_path)][-1] == (4, 0)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_shorter_than_the_limit_ends_as_unhealthy_too(tmp_path: Path) -> None:
    with pytest.raises(UnhealthyError, match="had no target in 2 updates"):
        run(tmp_path, config(2), reader=OneFrame)


@pytest.mark.parametrize("text", ["", "日本語"], ids=["no text", "no symbol of the alphabet"])
def test_a_head_without_a_target_stops_the_run(tmp_path: Path, text: str) -> None:
    class Labelled(Changed):
        def change(self, batch: Batch, step: int) -> Batch:
            return dataclasses.replace(batch, labels={"text": (text, text)})

    with pytest.raises(UnhealthyError, match=r"'text' had no target in 10 updates.*data\.labels"):
        run(tmp_path, config(60, heads=CTC), reader=Labelled)


def test_a_head_with_some_targets_keeps_training(tmp_path: Path) -> None:
    run(tmp_path, config(12, heads=CTC, health={"window": 2}), reader=HalfText)
    assert not any("without targets" in event["detector"] for event in events(tmp_path))
    used = [row["data/usable_segments/text"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert used == [0.0, 8.0] * 6
    for tag in ("data/usable_segments/text", "metric/text/infeasible", "metric/text/foreign_symbols"):
        assert description(tag)


def test_a_head_without_a_target_may_be_a_mere_warning(tmp_path: Path) -> None:
    run(tmp_path, config(12, heads=CTC, health={"window": 3, "on_collapse": "warn"}))
    found = [event["step"] for event in events(tmp_path) if event["detector"] == "text without targets"]
    assert found == [2], "one alarm, after as many updates as health.window has"


def test_a_head_that_cannot_use_most_labels_is_reported(tmp_path: Path) -> None:
    run(tmp_path, config(12, heads=CTC, health={"window": 4}), reader=MostTextsTooLong)
    found = next(event for event in events(tmp_path) if event["detector"] == "text labels")
    assert "24 of 32" in found["message"]


def test_updates_without_targets_are_counted_across_a_resume(tmp_path: Path) -> None:
    often = {"checkpoint_every": 2, "keep_last": 3}
    limit = {"max_updates_without_targets": 3}
    run(tmp_path, config(4, train=often | {"steps": 4}, health=limit))
    memory = json.loads((tmp_path / "checkpoints" / "step_00000004" / "state.json").read_text())["health"]
    assert memory["without_targets"] == {"objective": 0}
    longer = config(40, train=often | {"steps": 40}, health=limit)
    with pytest.raises(UnhealthyError, match=r"3 updates in a row.*since step 4"):
        run(tmp_path, longer, reader=OneFrame)
    with pytest.raises(
        UnhealthyError, match=r"3 updates in a row.*since step 4"
    ):  # resumed at step 6 with a count of 2
        run(tmp_path, longer, reader=OneFrame)
    assert [event["step"] for event in events(tmp_path)] == [6, 6]


@pytest.mark.parametrize("reader", [Silent, Constant])
@pytest.mark.parametrize("objective", [BEST_RQ, WAV2VEC2], ids=lambda given: str(given["name"]))
def test_silent_audio_is_reported_at_the_first_update(
    tmp_path: Path, objective: dict[str, Any], reader: type[SyntheticReader]
) -> None:
    with pytest.raises(UnhealthyError, match=r"8 of 8 segments .* silent or constant: a0-0, b0-0") as stopped:
        run(tmp_path, config(60, objective), reader=reader)
    assert "learning rate" not in str(stopped.value)
    assert [event["detector"] for event in events(tmp_path)] == ["silent audio"]
    assert events(tmp_path)[0]["step"] == 0


def test_silence_that_begins_later_is_reported_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(UnhealthyError, match=r"8 of 8 segments .* silent or constant: a2\d-0"):
        run(tmp_path, config(60), reader=SilentFrom20)
    assert {event["detector"] for event in events(tmp_path)} == {"silent audio"}


def test_one_silent_segment_of_many_is_a_warning_only() -> None:
    limits = config().health
    fell = Finding("stem deviation", "collapse", "the output of stem varies by 0", "a lower learning rate")
    wait = Finding("data wait", "speed", "rank 0 waits", "more workers")
    (noted, same) = explained([fell, wait], Silence(1, 8, ("a",)), limits)
    assert "1 of 8 segments of one update are silent or constant: a" in noted.seen
    assert same == wait
    assert [seen.detector for seen in explained([fell, wait], Silence(5, 8, ("a",)), limits)] == [
        "silent audio",
        "data wait",
    ]
    assert explained([fell], Silence(), limits) == [fell]
    assert detectors.silence_note(9, 9, list("abcdefghi")).endswith("a, b, c, d, e and 4 more")


@pytest.mark.parametrize(
    ("wave", "silent"),
    [
        (np.zeros(800), True),
        (np.full(800, 0.7), True),
        (np.resize([0, 2**-15], 800), True),  # 16-bit rounding noise
        (np.sin(np.arange(800)) * 1e-3, False),
        (np.eye(1, 800)[0], False),  # a click
        (np.zeros(0), True),
    ],
)
def test_silent_audio_is_recognised(wave: np.ndarray, silent: bool) -> None:
    wave_BT = torch.zeros(1, 900)
    wave_BT[0, : len(wave)] = torch.from_numpy(wave)
    assert silent_segments([Batch(wave_BT, torch.tensor([len(wave)]), ("key",), 0)]) == ["key"] * silent


@pytest.mark.parametrize("objective", [BEST_RQ, WAV2VEC2, HUBERT], ids=lambda given: str(given["name"]))
def test_the_shortest_usable_segment_is_computed_without_building_weights(objective: dict[str, Any]) -> None:
    settings = config(objective=objective)
    assert least_samples(settings) == build_model(settings).least_samples


def test_segments_that_are_too_short_are_left_out_and_counted() -> None:
    lengths = [4.0] * 40 + [0.02] * 7 + [0.001] * 3 + [0.0]
    plan = make_plan(catalogue_of([lengths]), reader_config(min_seconds=0.01, max_seconds=8.0), 0, least_samples=1_520)
    assert plan.too_short == 7, "the remaining segments are below min_seconds"
    assert plan.constraints.shortest == 1_520
    used = {row for g in range(plan.layout(0).steps) for micro in plan.step(0, g) for row in micro.row_n.tolist()}
    assert used == set(range(40))


def test_a_plan_without_short_segments_is_unchanged() -> None:
    catalogue, settings = catalogue_of([[4.0] * 40 + [0.02]]), reader_config(min_seconds=1.0, max_seconds=8.0)
    assert make_plan(catalogue, settings, 0, least_samples=1_520).hash == make_plan(catalogue, settings, 0).hash
    looser = reader_config(min_seconds=0.0, max_seconds=8.0)
    assert make_plan(catalogue, looser, 0, least_samples=200).hash == make_plan(catalogue, looser, 0).hash


def test_an_empty_plan_is_refused_with_field_and_value() -> None:
    with pytest.raises(ConfigError, match=r"data\.min_seconds=0 \(40 segments of less than 0\.095 s are too short"):
        make_plan(catalogue_of([[0.02] * 40]), reader_config(min_seconds=0.0, max_seconds=8.0), 0, least_samples=1_520)
    short = reader_config(min_seconds=0.0, max_seconds=0.05)
    with pytest.raises(ConfigError, match=r"data\.max_seconds=0\.05 is below the 0\.095 s that the model needs"):
        make_plan(catalogue_of([[0.02] * 40]), short, 0, least_samples=1_520)


def test_the_reader_of_a_run_leaves_out_segments_too_short_for_its_model(tmp_path: Path) -> None:
    root = write_shards(tmp_path, [sounds([1.0] * 30 + [0.03] * 4)])
    data = {"shards": str(root), "batch_seconds": 4.0, "micro_batches": 2, "min_seconds": 0.0, "max_seconds": 2.0}
    reader = open_run_reader(config(data=data | {"workers": 0}))
    try:
        assert reader.plan.too_short == 4
        batches = [batch for step in itertools.islice(reader.steps(), 8) for batch in step.batches]
    finally:
        reader.close()
    assert min(int(batch.lengths_B.min()) for batch in batches) == 16_000


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"heads": CTC}, r"data\.labels=\[\].*heads\.text.*'text'"),
        (
            {"heads": CTC, "data": {"shards": "x", "micro_batches": 4, "labels": ["txt"]}},
            r"data\.labels=\['txt'\].*set data\.labels=\['txt', 'text'\]",
        ),
        (
            {"heads": {"text": {"name": "ctc", "label": "words"}}, "data": DATA | {"labels": ["words"]}},
            r"heads\.text\.label=words: .*auricle tokens label=words",
        ),
        ({"objective": HUBERT | {"labels": "kmeans"}}, r"objective\.labels=kmeans.*data\.targets"),
    ],
)
def test_labels_that_no_task_uses_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        require_fitting_labels(config(**given))
