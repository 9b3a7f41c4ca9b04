"""Iterated pretraining as a chain of commands: order, skipped links and refused settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, load
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.workflows import iterations

ARGUMENTS = ["+experiment=hubert_base", "data.shards=shards", "chain.it1.steps=2", "chain.it2.steps=3"]


def job(*more: str) -> PretrainJob:
    return load(PretrainJob, compose("pretrain", [*ARGUMENTS, *more]))


def test_each_link_uses_the_results_of_the_previous_one() -> None:
    found = iterations.links(job("runs=here", "seed=5"), [*ARGUMENTS, "runs=here", "seed=5"])
    assert [link.name for link in found] == ["it1-labels", "it1", "it2-labels", "it2"]
    assert [link.needs for link in found] == ["", "it1-labels", "it1", "it2-labels"]
    first, training, second, last = (dict(line.partition("=")[::2] for line in link.arguments) for link in found)
    assert first["features"] == "mfcc"
    assert second["features"] == "here/hubert_base-it1/checkpoints/step_00000002"
    for labels, run, classes, rate in ((first, training, "100", "100.0"), (second, last, "500", "50.0")):
        assert labels["classes"] == run["objective.units"] == classes
        assert run["objective.label_rate_hz"] == rate
        assert run["data.targets.units"] == labels["out"]
        assert run["seed"] == labels["seed"] == "5"
    alone = load(PretrainJob, compose("pretrain", list(found[3].arguments)))
    assert alone.train.steps == 3
    assert not alone.chain, "a link is an ordinary run without a chain"


def test_a_student_of_a_teachers_units_is_a_chain_of_two_links() -> None:
    arguments = ["+experiment=dice_hubert_tiny", "chain.units.features=runs/T", "data.shards=shards"]
    labels, training = iterations.links(load(PretrainJob, compose("pretrain", arguments)), arguments)
    assert {"features=runs/T", "layer=2", "classes=100"} <= {*labels.arguments}
    assert {"objective.units=100", "objective.label_rate_hz=50.0"} <= {*training.arguments}
    student = load(PretrainJob, compose("pretrain", list(training.arguments)))
    assert (student.encoder.layers, student.train.steps) == (2, 1000)


class Commands:
    """Stands in for the commands: records each call, and writes a job record if jobs are queued."""

    def __init__(self, queued: bool, fails: str = "") -> None:
        self.queued, self.fails = queued, fails
        self.ran: list[dict[str, str]] = []

    def __call__(self, arguments: list[str]) -> int:
        values = dict(line.partition("=")[::2] for line in arguments)
        self.ran.append(values)
        if self.queued:
            folder = Path(values["runs"]) / values["name"]
            folder.mkdir(parents=True)
            note = {"launcher": "slurm", "handle": f"{40 + len(self.ran)}", "host": "", "submitted": "", "config": {}}
            (folder / "job.json").write_text(json.dumps(note))
        return 1 if values["name"] == self.fails else 0


def run(commands: Commands, runs: Path, *more: str) -> int:
    arguments = [*ARGUMENTS, f"runs={runs}", *more]
    return iterations.run(job(f"runs={runs}", *more), arguments, {"targets": commands, "pretrain": commands})


def test_a_failed_link_ends_the_chain(tmp_path: Path) -> None:
    commands = Commands(queued=False, fails="hubert_base-it1")
    assert run(commands, tmp_path) == 1
    assert [values["name"] for values in commands.ran] == ["hubert_base-it1-labels", "hubert_base-it1"]


def test_a_scheduler_gets_all_links_each_depending_on_the_previous_one(tmp_path: Path) -> None:
    commands = Commands(queued=True)
    assert run(commands, tmp_path, "launcher=slurm") == 0
    assert [values.get("launcher.after") for values in commands.ran] == [None, "41", "42", "43"]
    assert all(values["launcher"] == "slurm" for values in commands.ran)


def test_a_single_link_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(queued=False)
    with pytest.raises(ConfigError, match="link=it1 needs it1-labels"):
        run(commands, tmp_path, "link=it1")
    monkeypatch.setattr(iterations.Link, "finished", lambda link: link.name != "it2")
    assert run(commands, tmp_path, "link=it2") == 0
    assert [values["name"] for values in commands.ran] == ["hubert_base-it2"]
    with pytest.raises(ConfigError, match="no such link"):
        run(commands, tmp_path, "link=it3")


def test_fields_set_by_iterations_cannot_be_set_for_the_whole_chain() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps.*chain\.it1\.steps"):
        iterations.links(job(), [*ARGUMENTS, "train.steps=5"])
