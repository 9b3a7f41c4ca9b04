"""Failures planted into tiny real runs are caught within a few steps; healthy runs raise no alarm."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.types import Cursor, Step
from launch.runs.summary import audio_hours
from pretrain.engines.base import Engine
from pretrain.monitoring.batch_dump import MAX_KEPT, load_batches, replay
from pretrain.monitoring.health_monitor import UnhealthyError
from pretrain.train_module import build_model
from tests.support.planted_failures import (
    BEST_RQ,
    DATA2VEC,
    DINOSR,
    PLANTED,
    RELABELLED,
    TIME_CONTRASTIVE,
    WAV2VEC2,
    Plant,
    break_stem,
    config,
    events,
    one_code,
    run,
    same_prediction,
    same_target,
    shrink_rank,
    skip_last_micro_batch,
    zero_stem,
)
from tests.support.synthetic_reader import SyntheticReader


class Repeating(SyntheticReader):
    """Repeats one global step, which a tiny model learns quickly."""

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        first = next(super().steps())
        for number in itertools.count(1):
            yield dataclasses.replace(first, after=Cursor(self.plan_hash, 0, number))


@pytest.mark.parametrize(
    "objective",
    [pytest.param(BEST_RQ, id="best_rq"), pytest.param(WAV2VEC2, id="wav2vec2", marks=pytest.mark.slow)],
)
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, objective: dict[str, Any]) -> None:
    encoder = {"name": "transformer", "layers": 2, "dim": 64, "heads": 2, "ffn_dim": 128, "norm": "pre", "dropout": 0.0}
    health = {"grace_steps": 70, "window": 20}
    run(tmp_path, config(110, objective, encoder=encoder, health=health), reader=Repeating)
    assert events(tmp_path) == []
    row = read_rows(tmp_path / "metrics.jsonl")[-2]
    assert {"health/std/stem", "health/std/layer_2", "health/rank/layer_2", "health/alarms"} <= row.keys()


@pytest.mark.parametrize(
    "units", [16, pytest.param(32, marks=pytest.mark.slow)], ids=["another length", "the same length"]
)
def test_detectors_restart_at_a_relabelling(tmp_path: Path, units: int) -> None:
    objective = RELABELLED | {"relabel_units": units}
    run(tmp_path, config(22, objective), reader=Repeating)
    run(tmp_path, config(60, objective), reader=Repeating)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 60
    assert events(tmp_path) == []


def test_codes_that_collapse_after_a_relabelling_are_caught(tmp_path: Path) -> None:
    def one_centre(engine: Engine) -> None:
        engine.module.objective.get_buffer("layer_centres_KD")[1:] = 1e3

    with pytest.raises(UnhealthyError, match="of 16 codes"):
        run(tmp_path, config(60, RELABELLED), one_centre)
    assert all(event["since"] > PLANTED for event in events(tmp_path))


@pytest.mark.parametrize(
    ("plant", "once", "detector", "within", "objective"),
    [
        (zero_stem, False, "stem deviation", 6, BEST_RQ),
        (break_stem, True, "not finite", 0, BEST_RQ),
        (one_code, False, "code use", 20, BEST_RQ),
        (one_code, False, "target_std deviation", 8, WAV2VEC2),
        (same_prediction, False, "prediction_std deviation", 8, DATA2VEC),
        (same_prediction, False, "prediction_std deviation", 8, TIME_CONTRASTIVE),
        (same_target, False, "target_std deviation", 8, TIME_CONTRASTIVE),
    ],
    ids=[
        "dead stem",
        "NaN stem",
        "collapsed targets",
        "collapsed codebook",
        "constant prediction",
        "constant prediction (time_contrastive)",
        "constant targets (time_contrastive)",
    ],
)
def test_a_planted_failure_is_caught(
    tmp_path: Path, plant: Plant, once: bool, detector: str, within: int, objective: dict[str, Any]
) -> None:
    with pytest.raises(UnhealthyError, match="what usually helps"):
        run(tmp_path, config(objective=objective), plant, once)
    caught = next(event for event in events(tmp_path) if event["step"] >= PLANTED and event["detector"] == detector)
    assert caught["step"] - PLANTED <= within
    assert PLANTED <= caught["since"] <= caught["step"]


def test_a_falling_effective_rank_is_caught(tmp_path: Path) -> None:
    run(tmp_path, config(36), shrink_rank)
    caught = [event for event in events(tmp_path) if event["detector"].endswith("rank")]
    assert {event["detector"] for event in caught} >= {"layer_1 rank"}
    assert PLANTED <= caught[0]["since"] <= caught[0]["step"] <= PLANTED + 6


def test_targets_of_unnormalised_features_stop_a_run_at_its_first_update(tmp_path: Path) -> None:
    def louder_features(engine: Engine) -> None:
        mel = engine.module.objective.mel
        plain = mel.forward
        mel.forward = lambda *given: plain(*given)._replace(x_BFD=4.0 * plain(*given).x_BFD - 6.0)

    with pytest.raises(UnhealthyError, match="fixed targets need 0 and 1"):
        run(tmp_path, config(), louder_features, planted=0)
    assert events(tmp_path)[0]["step"] == 0


class Labelled(SyntheticReader):
    """Adds constant labels."""

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        for step in super().steps(cursor):
            given = {"units": torch.zeros(2, 200, dtype=torch.long)}
            yield dataclasses.replace(step, batches=tuple(dataclasses.replace(b, targets=given) for b in step.batches))


@pytest.mark.parametrize(
    ("objective", "reader", "plant"),
    [
        (BEST_RQ | {"mask_share": 0.9}, SyntheticReader, one_code),
        ({"name": "hubert", "units": 32, "labels": "units", "projection_dim": 0}, Labelled, lambda engine: None),
    ],
    ids=["best_rq", "hubert"],
)
def test_given_targets_without_information_are_refused_before_the_first_update(
    tmp_path: Path, objective: dict[str, Any], reader: type[SyntheticReader], plant: Plant
) -> None:
    weights: list[torch.Tensor] = []
    before: list[torch.Tensor] = []

    def look(engine: Engine) -> None:
        plant(engine)
        weights[:] = engine.module.parameters()
        before[:] = [weight.detach().clone() for weight in weights]

    with pytest.raises(UnhealthyError, match=r"entropy is 0\.00 nats"):
        run(tmp_path, config(4, objective), look, reader=reader, planted=0)
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    assert [(event["detector"], event["step"]) for event in events(tmp_path)] == [("target entropy", 0)]


def test_a_contrastive_model_at_chance_level_is_caught(tmp_path: Path) -> None:
    run(tmp_path, config(30, WAV2VEC2, optimizer={"lr": 1e-9}))
    caught = {event["detector"] for event in events(tmp_path)}
    assert "chance" in caught


@pytest.mark.parametrize(
    ("objective", "weights", "spoil", "named"),
    [
        (BEST_RQ | {"codebooks": 4}, "quantizers.2.projection_DC", lambda x: x.zero_(), "book 3 of 4"),
        (WAV2VEC2 | {"n_codes": 32}, "quantizer.logits.bias", lambda x: x[0].fill_(1e4), "book 1 of 2"),
        (DINOSR, "sums_LVD", lambda x: x[0, 1:].fill_(1e3), "book 2 of 2"),
    ],
    ids=["best_rq", "wav2vec2", "dinosr"],
)
def test_one_collapsed_codebook_of_several_is_caught(
    tmp_path: Path, objective: dict[str, Any], weights: str, spoil: Callable[[torch.Tensor], object], named: str
) -> None:
    def one_book(engine: Engine) -> None:
        with torch.no_grad():
            for name, tensor in engine.module.objective.state_dict(keep_vars=True).items():
                if name == weights:
                    spoil(tensor)

    health = {"on_collapse": "warn", "min_stage_std": 0.0}
    run(tmp_path, config(44, objective, health=health), one_book, once=False)
    caught = next(event for event in events(tmp_path) if event["detector"] == "code use")
    assert PLANTED < caught["step"] <= PLANTED + 20
    assert named in caught["message"]


def test_a_model_that_does_not_learn_is_caught(tmp_path: Path) -> None:
    run(tmp_path, config(40, optimizer={"lr": 1e-9}))
    caught = [event for event in events(tmp_path) if event["detector"] == "chance"]
    assert caught
    assert caught[0]["step"] <= 20 + 3 * 2


def test_a_wrong_amount_of_audio_per_update_is_caught(tmp_path: Path) -> None:
    run(tmp_path, config(20, data={"shards": "synthetic", "micro_batches": 4, "batch_seconds": 13.88}))
    caught = next(event for event in events(tmp_path) if event["detector"] == "audio per update")
    assert caught["step"] <= 10 + 3 * 2


def test_an_engine_that_skips_a_micro_batch_is_caught(tmp_path: Path) -> None:
    run(tmp_path, config(40), skip_last_micro_batch)
    caught = next(event for event in events(tmp_path) if event["detector"] == "audio per update")
    assert PLANTED <= caught["since"] <= caught["step"] <= PLANTED + 5 + 3 * 2
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["data/audio_seconds"] < 0.8 * rows[0]["data/audio_seconds"]


def test_metrics_rows_at_a_longer_interval_include_all_updates(tmp_path: Path) -> None:
    spikes = (PLANTED, PLANTED + 4)
    often = {"steps": 40, "checkpoint_every": 10, "keep_last": 20}
    run(tmp_path / "each", config(40, train=often), scaled=spikes)
    run(tmp_path / "tenth", config(25, train=often | {"steps": 25, "log_every": 10}), scaled=spikes)
    run(tmp_path / "tenth", config(40, train=often | {"log_every": 10}), scaled=spikes)
    each, tenth = read_rows(tmp_path / "each" / "metrics.jsonl"), read_rows(tmp_path / "tenth" / "metrics.jsonl")
    heard = list(itertools.accumulate(row["data/audio_seconds"] for row in each))
    assert [row["data/audio_hours"] for row in tenth] == pytest.approx([heard[row["step"] - 1] / 3600 for row in tenth])
    assert audio_hours(tenth)[-1] == audio_hours(each)[-1] == pytest.approx(heard[-1] / 3600)
    assert all("health/std/stem" in row for row in tenth)
    assert sum(row["health/skipped"] for row in tenth) == 2


def test_a_probe_that_gets_worse_is_reported(tmp_path: Path) -> None:
    lines = [
        json.dumps({"step": step, "name": "phones/non_silence", "measure": "non-silence frames", "value": value})
        for step, value in ((4, 0.4), (8, 0.37), (12, 0.33), (16, 0.31))
    ]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    run(tmp_path, config(8))
    assert [event["detector"] for event in events(tmp_path)] == ["phones/non_silence falling"]


def test_a_spike_is_skipped_and_its_batch_saved(tmp_path: Path) -> None:
    spiked = run(tmp_path, config(PLANTED + 1), scaled=(PLANTED,))
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["health/skipped"] == 1.0
    assert [event["detector"] for event in events(tmp_path) if event["step"] == PLANTED] == ["gradient spike"]
    one_less = run(tmp_path / "short", config(PLANTED))
    expected = dict(one_less.tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in spiked.tensors())
    ctx, batches, why = load_batches(tmp_path / "health" / f"step_{PLANTED:08d}")
    assert ctx.step == PLANTED
    assert len(batches) == 4
    assert "gradient norm" in why
    results = replay(build_model(config()), ctx, batches)
    assert all(math.isfinite(result.loss) and result.first_not_finite == "" for result in results)


@pytest.mark.parametrize(("before", "said"), [(MAX_KEPT, "auricle replay"), (2 * MAX_KEPT, "not kept")])
def test_a_broken_batch_is_saved_beside_spikes_and_reported_only_if_saved(
    tmp_path: Path, before: int, said: str
) -> None:
    for number in range(before):
        (tmp_path / "health" / f"step_9{number:07d}").mkdir(parents=True)
    with pytest.raises(UnhealthyError, match=said):
        run(tmp_path, config(), break_stem, planted=2)
    assert (tmp_path / "health" / "step_00000002").exists() == (said == "auricle replay")


def test_replay_names_the_first_module_with_non_finite_output(tmp_path: Path) -> None:
    with pytest.raises(UnhealthyError):
        run(tmp_path, config(), break_stem)
    ctx, batches, _ = load_batches(tmp_path / "health" / f"step_{PLANTED:08d}")
    module = build_model(config())
    with torch.no_grad():
        next(module.model.frontend.parameters()).fill_(math.nan)
    assert replay(module, ctx, batches)[0].first_not_finite.startswith("model.frontend")


def test_a_collapse_is_rolled_back_and_training_continues_with_later_data(tmp_path: Path) -> None:
    settings = config(36, health={"on_collapse": "rollback", "on_nan": "rollback", "grace_steps": 1000})
    run(tmp_path, settings, break_stem)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 37))
    assert all(math.isfinite(row["loss/total"]) for row in rows)
    assert [event["detector"] for event in events(tmp_path) if event["kind"] == "nan"] == ["not finite"]
    state = json.loads((tmp_path / "checkpoints" / "step_00000036" / "state.json").read_text())
    # steps 21 and 22 were repeated after the failure, with the data that follows it
    assert state["cursor"]["epoch"] * 10 + state["cursor"]["step"] == 36 + 3
    assert state["health"]["rollbacks"] == 1


def test_a_dead_stem_is_rolled_back_once(tmp_path: Path) -> None:
    settings = config(44, health={"on_collapse": "rollback"}, train={"steps": 44, "checkpoint_every": 4})
    run(tmp_path, settings, zero_stem)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 45))
    assert rows[-1]["data/audio_hours"] == pytest.approx(sum(row["data/audio_seconds"] for row in rows) / 3600)
    assert "stem deviation" in {event["detector"] for event in events(tmp_path)}
    assert rows[PLANTED + 2]["health/std/stem"] > 0.1 * rows[0]["health/std/stem"]
    state = json.loads((tmp_path / "checkpoints" / "step_00000044" / "state.json").read_text())
    assert state["health"]["rollbacks"] == 1
    assert all(event["step"] <= PLANTED + 8 for event in events(tmp_path) if event["kind"] == "collapse")


@pytest.mark.slow
def test_a_failure_found_over_a_window_is_rolled_back_to_before_its_start(tmp_path: Path) -> None:
    # statistics over 10 updates show the collapse late: checkpoints from step 24 on were saved after it
    settings = config(
        60,
        health={"on_collapse": "rollback", "min_perplexity": 0.6, "confirm": 1},
        train={"steps": 60, "checkpoint_every": 2, "keep_last": 40},
    )
    run(tmp_path, settings, one_code)
    seen = next(event for event in events(tmp_path) if event["detector"] == "code use")
    assert seen["since"] > PLANTED + 2
    aside = sorted(int(path.name[-8:]) for path in (tmp_path / "checkpoints").glob("unhealthy_step_*"))
    assert aside[0] <= PLANTED + 2
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["metric/perplexity"] > 10


def test_evaluations_of_rolled_back_steps_do_not_count(tmp_path: Path) -> None:
    def evaluate(engine: Engine) -> None:
        lines = [
            {"step": step, "name": "phones/non_silence", "measure": "non-silence frames", "value": value}
            for step, value in ((4, 0.4), (8, 0.37), (12, 0.33), (16, 0.31))
        ]
        (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    often = {"steps": 36, "checkpoint_every": 2, "keep_last": 40}
    settings = config(36, health={"on_chance": "rollback", "window": 40}, train=often)
    run(tmp_path, settings, evaluate)
    assert [event["detector"] for event in events(tmp_path)] == ["phones/non_silence falling"]
    assert (tmp_path / "checkpoints" / "unhealthy_step_00000006").is_dir()
    assert (tmp_path / "checkpoints" / "step_00000004").is_dir(), "the checkpoint with the best evaluation"


def test_a_rollback_without_an_old_enough_checkpoint_ends_the_run_as_unhealthy(tmp_path: Path) -> None:
    settings = config(36, health={"on_nan": "rollback"}, train={"steps": 36, "checkpoint_every": 36})
    with pytest.raises(UnhealthyError, match=r"there is no checkpoint of step .* train.checkpoint_every=36"):
        run(tmp_path, settings, break_stem)


def test_the_number_of_rollbacks_is_limited(tmp_path: Path) -> None:
    settings = config(36, health={"on_nan": "rollback", "max_rollbacks": 2})
    with pytest.raises(UnhealthyError, match="max_rollbacks=2 are used up"):
        run(tmp_path, settings, break_stem, once=False)


def test_a_resumed_run_skips_the_same_updates(tmp_path: Path) -> None:
    spikes = (PLANTED, PLANTED + 4)
    whole = run(tmp_path / "whole", config(PLANTED + 6), scaled=spikes)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] - 1 for row in rows if row["health/skipped"]] == list(spikes)
    run(tmp_path / "parts", config(PLANTED + 2, schedule={"name": "constant", "warmup_steps": 2}), scaled=spikes)
    resumed = run(tmp_path / "parts", config(PLANTED + 6), scaled=spikes)
    expected = dict(whole.tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.tensors())
