"""Config changes that a resume accepts (paths, caches, timeouts) and refuses (another model or other data)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import ConfigError, dump, load, resume_rules
from data_pipeline.loader.reader import open_reader
from pretrain.checkpointing import resume
from pretrain.config import Config
from pretrain.lr_schedule import Prolongation, learning_rate
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import config

SAVED = Path("runs/x/checkpoints/step_00000002")


def changed(**fields: Any) -> Config:
    """Returns the config of tests.support.training with fields set, as in `data__workers=3`."""
    values = dump(config())
    for name, value in fields.items():
        *parents, last = name.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return load(Config, values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "other"),
        ("runs", "elsewhere"),
        ("device", "cpu"),
        ("data__timeout_seconds", 7.0),
        ("data__cache", "/tmp/cache"),
        ("data__cache_gigabytes", 3.0),
        ("data__keys_log", "keys"),
        ("data__workers", 5),
        ("data__prefetch", 7),
        ("data__verify", True),
        ("data__on_bad_shard", "skip"),
        ("data__shards", "synthetic/"),
        ("data__shards", "/moved/elsewhere"),
        ("data__targets", {"units": "labels/"}),
        ("engine__precision", "bf16"),
        ("engine__timeout_minutes", 3.0),
        ("train__steps", 60),
        ("health__every", 3),
        ("schedule__continuation", "rewarm"),
    ],
)
def test_a_resume_accepts_changed_fields(name: str, value: object) -> None:
    resume.require_same_config(dump(config()), changed(**{name: value}), SAVED)


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("seed", 3, "0"),
        ("data__min_seconds", 1.0, "2.0"),
        ("data__batch_seconds", 50.0, "5600.0"),
        ("encoder__layers", 3, "2"),
        ("objective__n_codes", 64, "32"),
        ("optimizer__lr", 1.0, "0.001"),
        ("schedule__warmup_steps", 3, "2"),
        ("data__augment", {"noise": "noises"}, "''"),
        ("init", "runs/other", "''"),
    ],
)
def test_a_resume_refuses_changed_fields(name: str, value: object, before: str) -> None:
    """The message gives the field, both values and the remedy."""
    with pytest.raises(ConfigError) as refused:
        resume.require_same_config(dump(config()), changed(**{name: value}), SAVED)
    said = str(refused.value)
    assert name.replace("__", ".") in said
    assert f"{before} in the checkpoint" in said
    assert "name=" in said


def test_every_difference_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"encoder.layers.*optimizer.lr.*seed"):
        resume.require_same_config(dump(config()), changed(seed=3, encoder__layers=3, optimizer__lr=1.0), SAVED)


def test_fields_missing_from_an_earlier_version_have_their_defaults() -> None:
    saved = dump(config())
    del saved["schedule"]["continuation"], saved["data"]["on_bad_shard"], saved["optimizer"]["clip_norm"]
    resume.require_same_config(saved, config(), SAVED)
    with pytest.raises(ConfigError, match=r"optimizer.clip_norm: 0.0 in the checkpoint, 1.0 now"):
        resume.require_same_config(saved, changed(optimizer__clip_norm=1.0), SAVED)


def test_equivalent_spellings_of_a_path_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init=` and noise folders are not covered by the plan's hash, so they must stay the same location."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    saved = dump(changed(init="weights"))
    for same in ("weights/", "./weights", str(tmp_path / "weights"), "link", f"file://{tmp_path}/weights"):
        resume.require_same_config(saved, changed(init=same), SAVED)
    with pytest.raises(ConfigError, match="init"):
        resume.require_same_config(saved, changed(init="other"), SAVED)
    assert resume.same_path("s3://bucket/shards", "s3://bucket/shards/")
    assert not resume.same_path("s3://bucket/shards", "s3://bucket/Shards")
    assert not resume.same_path("", str(tmp_path)), "an empty path is not the working directory"
    assert resume.same_path(["a", "b/"], ["a/", "b"])
    assert not resume.same_path(["a", "b"], ["b", "a"])


def test_moved_data_is_accepted_and_other_data_is_refused(tmp_path: Path) -> None:
    """The plan's hash is compared before any rank starts."""
    lengths = [2.0] * 8
    write_shards(tmp_path / "shards", [sounds(lengths)])
    data = {"batch_seconds": 4.0, "micro_batches": 1, "max_seconds": 3.0, "min_seconds": 1.0, "workers": 0}
    settings = load(Config, dump(config()) | {"data": {"shards": str(tmp_path / "shards"), **data}})
    reader = open_reader(settings.data, settings.seed, 0, 1)
    state = {"config": dump(settings), "cursor": {"plan_hash": reader.plan_hash, "epoch": 0, "step": 1}}
    reader.close()

    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    moved = replace(settings, data=replace(settings.data, shards=str(tmp_path / "moved")))
    resume.require_same_data(state, moved, SAVED)

    write_shards(tmp_path / "other", [sounds([2.0] * 9)])
    other = replace(settings, data=replace(settings.data, shards=str(tmp_path / "other")))
    with pytest.raises(ConfigError) as refused:
        resume.require_same_data(state, other, SAVED)
    for fact in ("data.shards", str(tmp_path / "shards"), str(tmp_path / "other"), "name="):
        assert fact in str(refused.value)

    gone = replace(settings, data=replace(settings.data, shards=f"{tmp_path}/shards/"))
    (tmp_path / "shards").rename(tmp_path / "away")
    resume.require_same_data(state, gone, SAVED)  # an unchanged location is not opened here, but by the ranks


def test_all_fields_in_the_rules_exist() -> None:
    rules = resume_rules(Config)
    assert {"engine", "train", "health", "data.cache", "data.shards"} <= rules.keys()
    assert rules["data.shards"] == rules["data.targets"] == "data"
    assert "seed" not in rules
    assert "engine.zero_stage" not in rules, "as the section engine"
    assert rules["engine.federated.noise"] == rules["engine.federated.rule"] == "fixed"
    assert "engine.federated.answer_seconds" not in rules


def prolonged(before: int, after: int, done: int, **schedule: Any) -> tuple[Config, Prolongation | None, str]:
    """Resumes a run of `before` steps after `done` of them with train.steps=after."""
    then = changed(train__steps=before)
    now = changed(train__steps=after, **{f"schedule__{name}": value for name, value in schedule.items()})
    saved = dump(then)
    found = resume.prolongation(saved, now, done, None)
    return now, found, resume.prolongation_notice(saved, now, done, found)


def rates(now: Config, found: Prolongation | None, steps: range) -> list[float]:
    return [learning_rate(now.optimizer, now.schedule, now.train.steps, step, found) for step in steps]


def test_prolonging_a_finished_run_reports_the_learning_rate_change() -> None:
    now, found, notice = prolonged(100, 200, 100)
    assert found == Prolongation(100, 0.0)
    assert rates(now, found, range(100, 101)) == pytest.approx([1e-3 * (1 - 99 / 198)])
    for fact in ("train.steps was 100 and is 200", " 0 ", "0.0005", "schedule.continue", "rewarm", "constant"):
        assert fact in notice


def test_rewarming_rises_to_the_planned_rate_and_follows_it() -> None:
    now, found, _ = prolonged(100, 1_100, 100, continuation="rewarm", warmup_steps=2)
    got = rates(now, found, range(100, 110))
    planned = rates(now, None, range(100, 110))
    assert got[0] == pytest.approx(planned[0] / 2)
    assert got[1:] == pytest.approx(planned[1:])


def test_a_constant_rate_stays_until_the_new_end() -> None:
    now, found, _ = prolonged(100, 200, 50, continuation="constant")
    assert found is not None
    assert rates(now, found, range(50, 200)) == [found.rate] * 150
    assert found.rate == pytest.approx(1e-3 * (1 - 48 / 98))


def test_a_learning_rate_of_zero_cannot_be_continued() -> None:
    with pytest.raises(ConfigError, match="rewarm"):
        prolonged(100, 200, 100, continuation="constant")


def test_a_second_resume_continues_the_first_prolongation() -> None:
    """train.steps has not changed since, so the step of the prolongation comes from the checkpoint."""
    now, found, _ = prolonged(100, 200, 50, continuation="constant")
    assert found is not None
    again = resume.prolongation(dump(now), now, 120, {"step": found.step, "rate": found.rate})
    assert again == found
    assert resume.prolongation_notice(dump(now), now, 120, again) == ""


@pytest.mark.parametrize("name", ["constant", "noam"])
def test_schedules_without_an_end_are_not_changed(name: str) -> None:
    then = changed(train__steps=100, schedule__name=name)
    now = replace(then, train=replace(then.train, steps=200))
    found = resume.prolongation(dump(then), now, 100, None)
    assert resume.prolongation_notice(dump(then), now, 100, found) == ""


def test_continue_is_an_alias_of_the_field() -> None:
    values = dump(config())
    values["schedule"].pop("continuation")
    values["schedule"]["continue"] = "rewarm"
    assert load(Config, values).schedule.continuation == "rewarm"
