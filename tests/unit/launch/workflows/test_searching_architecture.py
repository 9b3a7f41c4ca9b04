"""auricle search-architecture from a tiny supernet: front, cut runs, a second call, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError
from launch.config import PretrainJob
from launch.main import main
from launch.runs.metadata import run_config
from launch.workflows import pretraining
from launch.workflows import searching_architecture as searching
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint
from pretrain.compression.cut import cut_subnet
from pretrain.compression.latency import measured_subnets
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze
from pretrain.evaluate.metrics import Tally
from pretrain.interfaces.subnets import ElasticConfig, Space, Subnet
from pretrain.train import Ending
from tests.support.training import run, save

ELASTIC: dict[str, Any] = {"blocks": [1, 2], "heads": [1, 2], "ffn": [16, 64]}
SPACE = Space(ElasticConfig(**{name: tuple(sizes) for name, sizes in ELASTIC.items()}), 2, 2, 64, 1)


def milliseconds(subnet: Subnet) -> float:
    return 5.0 + sum(1.0 + heads + ffn / 16 for heads, ffn in subnet)


def table() -> dict[str, Any]:
    rows = [[h, f, 9.0, 9.0, 1.0 + h + f / 16] for h in SPACE.heads for f in SPACE.ffn]
    subnets = measured_subnets(SPACE, 12)
    timed = [[[list(pair) for pair in subnet], 9.0, 9.0, milliseconds(subnet)] for subnet in subnets]
    return {"threads": 1, "seconds": 10.0, "rows": rows, "subnets": timed}


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a command line; probe and timing are made up, and scores are counted in `scored`."""
    save(tmp_path / "super", 2, objective={"name": "distil", "elastic": ELASTIC})
    (tmp_path / "latency.json").write_text(json.dumps(table()))
    monkeypatch.setattr(searching, "_probe", lambda checkpoint, options: None)
    monkeypatch.setattr(searching, "subnet_score", lambda task, found, subnet: sum(f for _, f in subnet) / 200)
    monkeypatch.setattr(
        searching,
        "subnet_timings",
        lambda found, subnets, **options: {"subnets": [[s, 0.0, 0.0, milliseconds(s)] for s in subnets]},
    )
    run = str(find_checkpoint(str(tmp_path / "super")))
    given = ["--table", str(tmp_path / "latency.json"), "--trials", "12", "--population", "4"]
    return ["search-architecture", run, str(tmp_path / "found"), *given]


def test_finalists_become_runs_and_a_second_call_adds_no_score(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    limits = ["--rtf", f"{milliseconds(((1, 64), (1, 16))) / 10_000 + 1e-5:.6f}", "--finalists", "2"]
    assert main([*line, *limits]) == 0
    printed = capsys.readouterr().out
    assert "to train on: init=" in printed
    found = json.loads((tmp_path / "found" / "front.json").read_text())
    assert found["latency_error"] < 0.01
    best = found["finalists"][-1]
    assert best["widths"] == [[1, 64]] or sum(f for _, f in best["widths"]) == 80
    cut = load_checkpoint(find_checkpoint(str(tmp_path / "found" / best["run"])))
    assert [list(pair) for pair in cut.config.encoder.widths] == best["widths"]  # type: ignore[attr-defined]
    assert best["measured_rtf"] == pytest.approx(best["rtf"], rel=0.01)
    assert (tmp_path / "found" / "front.png").stat().st_size > 5_000
    scores = (tmp_path / "found" / "scores.jsonl").read_bytes()
    assert main([*line, *limits]) == 0
    again = capsys.readouterr().out
    told = [[text for text in said.splitlines() if text.startswith("to train on: ")] for said in (printed, again)]
    assert told[0] == told[1]
    assert (tmp_path / "found" / "scores.jsonl").read_bytes() == scores
    assert json.loads((tmp_path / "found" / "front.json").read_text()) == found
    assert main([*line, *limits, "--seed", "1"]) == 2
    assert "holds a search with another seed; give a new folder" in capsys.readouterr().err


def test_finalists_are_distilled_on_and_scored_again(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    begun: list[PretrainJob] = []

    def start(job: PretrainJob) -> int:
        """Trains in this process, which does not load a teacher: the run's own first weights teach."""
        begun.append(job)
        config = run_config(job)
        config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, teacher="", layers=()))
        return 0 if run(Path(job.runs) / job.name, config)[0] is Ending.FINISHED else 1

    def opened(name: str) -> LoadedCheckpoint:
        return load_checkpoint(find_checkpoint(str(tmp_path / "found" / name)))

    monkeypatch.setattr(pretraining, "start", start)
    monkeypatch.setattr(searching, "_score", lambda task, encoder: 0.75)
    options = [*line, "--finalists", "2", "--processes", "1", "--updates"]
    assert main([*options, "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("distilled on: ") == 2
    assert "75.0%" in printed
    found = json.loads((tmp_path / "found" / "front.json").read_text())["finalists"]
    assert [final["distilled_score"] for final in found] == [0.75, 0.75]
    assert len(begun) == 2
    for job, final in zip(begun, found, strict=True):
        assert (job.name, job.launcher.processes) == (final["distilled_run"], 1)
        assert job.objective.teacher_run == line[1], "the supernet was its own teacher"
        trained, cut = opened(final["distilled_run"]), opened(final["run"]).module.model.state_dict()
        assert (trained.step, trained.module.objective.space()) == (3, None)
        assert [list(pair) for pair in trained.config.encoder.widths] == final["widths"]  # type: ignore[attr-defined]
        moved = [not torch.equal(weight, cut[name]) for name, weight in trained.module.model.state_dict().items()]
        assert sum(moved) > len(moved) / 2
    assert main([*options, "3"]) == 0
    assert len(begun) == 2, "finished runs stay"
    monkeypatch.setattr(pretraining, "start", lambda job: 4)
    assert main([*options, "5"]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "the training ended with exit code 4; the same command continues it" in said


class HeardLayers:
    """A task that keeps the features that it would judge."""

    def scores(self, encoder: Callable[[int], FrozenEncoder], same: bool) -> dict[str, list[Tally]]:
        self.layers_LFD = encoder(0).encode(torch.arange(8_000) / 8_000)
        return {"heard": [{"speaker": (1.0, 2.0)}]}


def test_a_subnet_is_judged_by_its_last_layer(tmp_path: Path) -> None:
    save(tmp_path / "super", 2, objective={"name": "distil", "elastic": ELASTIC})
    _, found, space = searching.open_supernet(str(tmp_path / "super"))
    task = HeardLayers()
    assert searching.subnet_score(task, found, space.largest) == 0.5  # type: ignore[arg-type]
    whole = freeze(cut_subnet(found, space.largest).module.model, "whole")
    assert torch.equal(task.layers_LFD, whole.encode(torch.arange(8_000) / 8_000)[-1:])


def test_what_cannot_be_searched_is_refused(line: list[str], tmp_path: Path) -> None:
    save(tmp_path / "plain", 2)
    with pytest.raises(ConfigError, match=r"is no supernet; train one with \+experiment=supernet_tiny"):
        searching.open_supernet(str(tmp_path / "plain"))
    assert main([*line, "--rtf", "0"]) == 2
    assert main([*line, "--rtf", "0.0001"]) == 2
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["search.json"]
    (tmp_path / "latency.json").write_text("{}")
    assert main(line) == 2
    assert main(["bench", "--table", line[1], "--subnets", "2", "--heads", "1"]) == 2
    assert main(["bench", str(tmp_path), "--subnets", "2"]) == 2


@pytest.mark.slow
def test_a_table_of_a_supernet_has_blocks_and_whole_subnets(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--table", line[1], "--subnets", "3", "--runs", "3", "--seconds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in found["rows"]] == [[1, 16], [1, 64], [2, 16], [2, 64]]
    largest, smallest, _ = found["subnets"]
    assert (largest[0], smallest[0]) == ([[2, 64], [2, 64]], [[1, 16]])
    assert largest[3] > 0 < smallest[3]
