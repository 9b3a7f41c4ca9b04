"""Task separation: mixtures of different speakers, what perfect and useless estimates score, refused runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.core.schema import ConfigError
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.config import EvaluateConfig, SeparationConfig
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import read_manifest
from pretrain.evaluate.separation import draw_examples, ideal_masks, improvement
from pretrain.nn.separation import Spectra
from tests.support.contract_cases import SEPARATION
from tests.support.training import save


def test_mixtures_are_of_different_speakers_and_always_the_same(corpus: Path) -> None:
    utterances = read_manifest(corpus / "manifest.tsv")
    asked = SeparationConfig(mixtures=6, seconds=0.5, snr_db=(-3.0, 3.0))
    config = EvaluateConfig(checkpoint="x", corpora="tones", separation=asked)
    examples, again = (draw_examples(config, utterances, Waves(), 2) for _ in range(2))
    for example, other in zip(examples, again, strict=True):
        assert set(example.speakers) == {"speaker4", "speaker5"}
        assert torch.equal(example.parts_ST, other.parts_ST)
        power_S = example.parts_ST.square().mean(1)
        assert abs(float(10 * torch.log10(power_S[0] / power_S[1]))) <= 3.01
    assert [example.speakers[0] for example in examples] == ["speaker4", "speaker5"] * 3
    with pytest.raises(ConfigError, match=r"needs 3 speakers, and there are 2 in split ask=test of corpora=tones"):
        draw_examples(config, utterances, Waves(), 3)


def test_the_improvement_of_known_estimates() -> None:
    torch.manual_seed(0)
    parts_ST = torch.randn(2, 4000)
    mixture_ST = parts_ST.sum(0).expand(2, -1)
    assert improvement(mixture_ST, parts_ST).abs().max() < 1e-3
    noisy_ST = parts_ST + 0.1 * torch.randn(2, 4000)
    assert improvement(noisy_ST.flip(0), parts_ST).tolist() == pytest.approx([20.0, 20.0], abs=1.0)
    low_T, high_T = (torch.sin(torch.arange(4000) * rate) for rate in (0.1, 1.0))
    tones_ST = torch.stack([low_T, high_T])
    assert float(improvement(ideal_masks(tones_ST, Spectra(512, 128)), tones_ST).min()) > 20


def test_a_run_is_measured_beside_ideal_masks(corpus: Path, tmp_path: Path) -> None:
    save(tmp_path / "apart", 4, heads={"apart": SEPARATION})
    given = ["task=separation", "corpora=tones", f"manifest={corpus}/manifest.tsv", f"out={tmp_path}/found"]
    few = ["separation.mixtures=4", "separation.seconds=0.5", f"runs={tmp_path}", "name=evaluation"]
    assert main(["evaluate", f"checkpoint={tmp_path}/apart", *given, *few]) == ExitCode.DONE
    rows = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [row["measure"] for row in rows] == [
        "SI-SNR improvement, dB",
        "SI-SNR improvement of ideal ratio masks, dB",
    ]
    assert abs(rows[0]["value"]) < 6 < rows[1]["value"]


def test_a_run_that_separates_nothing_is_refused(corpus: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["task=separation", "corpora=tones", f"manifest={corpus}/manifest.tsv", f"runs={saved.parent}", "name=e"]
    assert main(["evaluate", f"checkpoint={saved}", *given]) == ExitCode.USAGE
    assert "the run has no head that separates speech; it has no heads" in capsys.readouterr().err
