"""`auricle evaluate` refuses wrong names with exit code 2 and the nearest name, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import main
from launch.exit_codes import ExitCode


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.tsv").write_text("path\tspeaker\tcorpus\tsplit\na.wav\ts\ttones\ttrain\n")
    (tmp_path / "phones").mkdir()
    (tmp_path / "phones" / "auto_pocketsphinx.tsv").write_text("path\tstart_s\tend_s\tphone\n")
    (tmp_path / "runs" / "hubert").mkdir(parents=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["task=NOSUCH"], "task=NOSUCH: there is no such task; there are: common_voice_languages, digits"),
        (["task=fonemes,phone"], "task=fonemes"),
        (["task=phone"], "did you mean phones?"),
        (["task=rankme,speakers"], "did you mean speaker?"),
        (["task=','"], "task=,: there is no such task"),
        (["layers=first"], "layers=first: 'first' is not the number of a layer"),
        (["checkpoint=runs/huber"], "did you mean runs/hubert?"),
        (["checkpoint=runs/hubert"], "checkpoint=runs/hubert: not a run folder with a checkpoint"),
        (["manifest=manifets.tsv"], "manifest=manifets.tsv: there is no such file"),
        (["checkpoint=runs/huber", "follow=true"], "checkpoint=runs/huber: with follow=true"),
        (["task=phone", "follow=true"], "did you mean phones?"),
    ],
)
def test_a_wrong_name_is_a_usage_error(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {"checkpoint": "runs/hubert", "task": "rankme", "manifest": "manifest.tsv"}
    fields = defaults | dict(item.split("=", 1) for item in given)
    assert main.main(["evaluate", *(f"{name}={value}" for name, value in fields.items())]) == ExitCode.USAGE
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_corpus_that_a_fine_tuning_does_not_find_is_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["checkpoint=runs/hubert", "manifest=manifest.tsv", "corpora=tunes"]
    assert main.main(["finetune", *given]) == ExitCode.USAGE
    assert "no text in the splits train and test of corpora=tunes" in capsys.readouterr().err
