"""Every kind of task, from its definition to rows: pairs, ranking and texts beside frames and utterances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.config import EvaluateConfig, FewShotConfig, TextProbeConfig
from pretrain.evaluate.evaluator import evaluate, few_threads
from pretrain.evaluate.frozen_encoders import FrozenEncoder, log_mel_with_context
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


def write_levels(folder: Path, takes_by_speaker: Mapping[str, Sequence[int]]) -> Path:
    """Writes a task's manifest: speakers are split-N and differ in level, takes are the labels and differ in length."""
    lines = ["path,speaker,label,split"]
    for number, (speaker, takes) in enumerate(takes_by_speaker.items(), start=1):
        for take in takes:
            name = f"{speaker}-{take}.wav"
            soundfile.write(folder / name, np.full(1600 * (take + 1), 0.1 * number), 16_000)
            lines.append(f"{name},{speaker},take{take},{speaker.split('-')[0]}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def knowing(kind: str, layer: int) -> FrozenEncoder:
    """Makes an encoder of two layers, of which one shows the speaker (pairs) or the label (ranking) and one nothing."""

    def encode(wave_T: torch.Tensor) -> torch.Tensor:
        level, take = round(float(wave_T.max()) * 10), len(wave_T) // 1600
        noise_D = torch.randn(16, generator=torch.Generator().manual_seed(100 * level + take))
        known_D = torch.eye(16)[level if kind == "pairs" else take]
        layers = [known_D, noise_D] if layer == 0 else [noise_D, known_D]
        return torch.stack(layers)[:, None].repeat(1, 8, 1)

    return FrozenEncoder("knowing", encode, 50.0)


def evaluated(kind: str, manifest: Path, layer: int) -> tuple[float, list[str]]:
    """Returns the value of the only row, and what was said."""
    (manifest.parent / "mine.yaml").write_text(f"kind: {kind}\ndata: {manifest}\n")
    task, said = str(manifest.parent / "mine.yaml"), list[str]()
    config = EvaluateConfig(checkpoint="given", task=task, seeds=1, bootstrap=100, baselines=False)
    [row] = evaluate(config, said.append, [knowing(kind, layer)])
    return row.value, said


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "best"), [("pairs", 0.0), ("ranking", 1.0)])
def test_a_single_validation_speaker_chooses_the_layer_with_those_of_training(
    kind: str, best: float, layer: int, tmp_path: Path
) -> None:
    speakers = ("train-0", "train-1", "train-2", "valid-0", "test-0", "test-1", "test-2")
    value, said = evaluated(kind, write_levels(tmp_path, dict.fromkeys(speakers, range(4))), layer)
    assert value == pytest.approx(best, abs=0.01)
    assert not any("no layer can be chosen" in line for line in said)


@pytest.mark.parametrize("kind", ["pairs", "ranking"])
def test_it_is_said_where_no_layer_can_be_chosen(kind: str, tmp_path: Path) -> None:
    takes = {"train-0": [0], "valid-0": [1], "test-0": [0, 1, 2], "test-1": [0, 1, 2]}
    _, said = evaluated(kind, write_levels(tmp_path, takes), 1)
    [line] = [line for line in said if "no layer can be chosen" in line]
    assert line.startswith("mine: ")
    assert line.endswith("the last one is taken")


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
