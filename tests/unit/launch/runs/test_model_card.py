"""The model card of an export has what the run's files record, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import load
from data_pipeline.shards.licences import record_licences
from data_pipeline.shards.records import done_records
from launch.commands.export import FORMATS
from launch.runs import data_record
from launch.runs.model_card import write_card
from pretrain.config import Config
from pretrain.train_module import build_model
from tests.support.checkpoint_states import write_run
from tests.support.tiny_shards import sounds, write_shards


def config(shards: str) -> Config:
    small = {"name": "transformer", "dim": 16, "layers": 1, "heads": 2, "ffn_dim": 16, "positions": "rope"}
    values: dict[str, Any] = {"frontend": {"name": "log_mel"}, "objective": {"name": "best_rq", "n_codes": 8}}
    return load(Config, values | {"encoder": small, "data": {"shards": shards}, "name": "a|b"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = config(str(write_shards(tmp_path / "shards", [sounds([36.0] * 5)])))
    write_run(tmp_path / "run", made, build_model(made), step=20)
    return tmp_path / "run"


def cells(card: Path) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in card.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_what_is_unknown_is_said_to_be_not_recorded(run: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "shards" / "_done").iterdir():
        file.unlink()
    write_card(tmp_path, str(run), "hugging_face")
    card, found = (tmp_path / "README.md").read_text(), cells(tmp_path / "README.md")
    assert card.startswith("---\nlicense: unknown\n")
    assert "library_name: transformers" in card.split("---")[1]
    assert {found[name] for name in ("data", "corpora", "languages", "started")} == {"not recorded"}
    assert found["code"] == "auricle not recorded, commit not recorded"
    assert found["licence"].startswith("not recorded")
    assert found["training"] == "20 updates"
    assert "\nNot recorded.\n" in card
    assert "# a\\|b\n" in card


def test_the_card_keeps_what_the_run_recorded_of_shards_that_have_moved(run: Path, tmp_path: Path) -> None:
    record_licences(str(tmp_path / "shards"), {"a": "CC0-1.0"})
    [record] = done_records(str(tmp_path / "shards"))
    flow = (("a", "en", "in", "", 5, 16_000), ("b", "de", "in", "", 5, 16_000))
    data_record.write(run, [dataclasses.replace(record, flow=flow)])
    (tmp_path / "shards").rename(tmp_path / "moved")
    write_card(tmp_path, str(run), "onnx")
    found = cells(tmp_path / "README.md")
    named = [found[name] for name in ("data", "corpora", "languages", "licence of the data")]
    assert named == ["0.05 h", "a, b", "de, en", "CC0-1.0 (a); not recorded (b)"]
    (run / "data.json").write_text('{"hours": []}')
    write_card(tmp_path, str(run), "onnx")
    assert cells(tmp_path / "README.md")["data"] == "not recorded"


def test_the_card_names_the_licences_of_weights_and_data(run: Path, tmp_path: Path) -> None:
    write_card(tmp_path, str(run), "onnx", "CC-BY-NC-4.0")
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: cc-by-nc-4.0\n")
    assert cells(tmp_path / "README.md")["licence of the data"] == "not recorded"
    [record] = done_records(str(tmp_path / "shards"))
    flow = tuple((corpus, "en", "in", "", 5, 16_000) for corpus in ("a", "b", "c"))
    record_file = tmp_path / "shards" / "_done" / f"{record.unit}.json"
    record_file.write_bytes(dataclasses.replace(record, flow=flow).to_json())
    record_licences(str(tmp_path / "shards"), dict.fromkeys(("a", "b", "another"), "CC0|1.0"))
    write_card(tmp_path, str(run), "onnx", 'my "own"')
    text, found = (tmp_path / "README.md").read_text(), cells(tmp_path / "README.md")
    assert text.startswith('---\nlicense: other\nlicense_name: "my \\"own\\""\n')
    assert (found["licence"], found["licence of the data"]) == ('my "own"', "CC0\\|1.0 (a, b); not recorded (c)")


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_has_the_figures_of_the_exported_checkpoint(run: Path, tmp_path: Path, form: str) -> None:
    environment = {"version": "1.2.3", "git_sha": "abc", "started": "2026-01-01T00:00:00+00:00"}
    (run / "environment.json").write_text(json.dumps(environment))
    metrics = [{"step": step, "loss/total": 5 - step / 10, "data/audio_hours": step / 4} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")
    measured = [
        {
            "step": step,
            "task": "phones",
            "measure": "accuracy",
            "who": "run",
            "value": step / 100,
            "low": 0.1,
            "high": 0.3,
        }
        for step in (10, 20)
    ]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, measured)) + "\n")
    errors = [{"decoder": "greedy", "wer": 0.5, "cer": 0.25, "utterances": 7}]
    (run / "results.json").write_text(json.dumps({"errors": errors}))
    write_card(tmp_path, str(run / "checkpoints" / "step_00000020"), form)
    found = cells(tmp_path / "README.md")
    assert found["data"] == "0.05 h"
    assert found["training"] == "20 updates, 5.00 h of audio"
    assert found["code"] == "auricle 1.2.3, commit abc"
    assert found["phones, accuracy, run"] == "0.2 (0.1 to 0.3)"
    assert found["recognition, greedy"] == "WER 50.00%, CER 25.00% on 7 utterances"
    assert found["loss, last logged"] == "3.0000"
    assert found["objective.n\\_codes"] == "8"
    assert str(tmp_path) not in (tmp_path / "README.md").read_text(), "no path of this machine"
