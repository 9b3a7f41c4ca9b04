"""Every kind of task, from its definition to rows: pairs, ranking and texts beside frames and utterances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.config import EvaluateConfig, FewShotConfig, TextProbeConfig
from pretrain.evaluate.evaluator import evaluate, few_threads
from pretrain.evaluate.frozen_encoders import log_mel_with_context
from pretrain.evaluate.rows import Detail


@pytest.mark.parametrize("kind", ["pairs", "ranking", "text", "utterances", "frames", "few_shot"])
def test_a_task_of_every_kind_is_evaluated(kind: str, corpus: Path, tmp_path: Path) -> None:
    lines = [f"kind: {kind}", f"data: {corpus / 'manifest.tsv'}", "alignment: phones.tsv"]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    config = EvaluateConfig(
        checkpoint="given", task=str(tmp_path / "mine.yaml"), seeds=2, bootstrap=100, baselines=False,
        text=TextProbeConfig(epochs=30, lr=0.05, batch=4, patience=30),
        few_shot=FewShotConfig(ways=3, shots=(1, 3), episodes=20, choice_episodes=5),
    )  # fmt: skip
    said: list[str] = []
    details: list[Detail] = []
    rows = evaluate(config, said.append, [log_mel_with_context(2)], details)
    values = {row.measure: row.value for row in rows}
    assert {row.task for row in rows} == {"mine"}
    assert said[0].startswith("mine: 0.01 h; utterances: train 27 of 3 speakers, valid 9 of 1 speakers, test 18 of 2")
    if kind == "pairs":
        assert 0 <= values["EER of verification"] <= 1
    elif kind == "ranking":
        assert values["mean average precision"] > 0.9  # the pitches are far apart
    elif kind == "few_shot":
        ways = ("accuracy of prototypes", "accuracy, fine-tuned")
        assert set(values) == {f"{way}, 3-way {shots}-shot" for way in ways for shots in (1, 3)}
        assert min(values.values()) > 0.9
    elif kind == "text":
        assert values["character error rate"] < 0.9  # a frame of a tone does not show which letter it is at
        assert set(values) == {"word error rate", "character error rate"}
    elif kind == "utterances":
        assert values["accuracy"] > 0.9
        assert "3 classes: high low middle" in said[0]
        [detail] = details
        assert detail.classes == ("high", "low", "middle")
        assert detail.confusion_CC is not None
        assert detail.confusion_CC.sum() == 18
    else:
        assert values["non-silence frames"] > 0.8
        assert details[0].confusion_CC is not None
        assert details[0].confusion_CC[details[0].classes.index("SIL")].sum() == 0


def test_the_command_evaluates_a_folder_of_classes(
    corpus: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in corpus.glob("*.wav"):
        place = tmp_path / "pitches" / file.stem.split("-")[1] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    given = [f"checkpoint={saved}", f"task={tmp_path / 'pitches'}", "baselines=false", "seeds=1", "bootstrap=100"]
    assert main(["evaluate", *given, f"out={tmp_path / 'out'}", f"runs={tmp_path / 'runs'}"]) == 0
    assert [row["task"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == ["pitches"]
    assert "pitches: speakers are not known" in capsys.readouterr().out


def test_threads_are_limited_in_an_evaluation_only() -> None:
    before = torch.get_num_threads()
    with few_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["few_shot.ways=7"], "few_shot.ways=7, few_shot.shots=1: too few classes"),
        (["few_shot.ways=3", "few_shot.shots=[99]"], "few_shot.ways=3, few_shot.shots=99: too few classes"),
        (["few_shot.ways=1"], "few_shot.ways=1"),
        (["few_shot.shots=[0]"], "few_shot.shots=[0]: each must be 1 or more"),
        (["few_shot.rates=[0.0]"], "few_shot.rates=[0.0]: each must be above 0"),
    ],
)
def test_episodes_that_cannot_be_drawn_end_with_what_there_is(
    given: list[str], message: str, corpus: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text(f"kind: few_shot\ndata: {corpus / 'manifest.tsv'}\n")
    places = [f"checkpoint={saved}", f"task={task}", f"manifest={corpus / 'manifest.tsv'}", "baselines=false"]
    assert main(["evaluate", *places, "seeds=1", *given]) == ExitCode.USAGE
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    if "too few" in message:
        assert "there are 3 classes" in said
