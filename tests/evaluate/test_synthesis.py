"""Task synthesis: every measure of an untrained voice, texts that it cannot speak, refused runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from data_pipeline.text.tokenizer import write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.speaker_similarity import PACKAGE, VoiceEncoder
from tests.support.contract_cases import SYNTHESIZER, speech_like
from tests.support.training import save

TEXTS = ("one two", "two three", "naïve", "three one")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    symbols = [*" 'abcdefghijklmnopqrstuvwxyz"]
    write_tokens(str(folder / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": symbols})
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(folder / "tokens")}}
    head = {"name": "synthesis", "vocabulary": len(symbols), "n_mels": 20, "synthesizer": SYNTHESIZER}
    save(folder / "speaks", 4, data=data, heads={"voice": head})
    rows = ["path\tspeaker\ttext\tcorpus\tsplit"]
    for number, text in enumerate(TEXTS):
        soundfile.write(folder / f"{number}.wav", speech_like(0.6 + 0.1 * number, number).numpy(), 16_000)
        rows.append(f"{number}.wav\tann\t{text}\tmade\ttest")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def evaluate(home: Path, run: Path, out: Path) -> int:
    given = ["task=synthesis", "corpora=made", "ask=test", "synthesis.listener=words", f"manifest={home}/manifest.tsv"]
    return main(["evaluate", f"checkpoint={run}", *given, f"out={out}", f"runs={out.parent}", "name=evaluation"])


def test_every_measure_is_written_and_a_text_that_cannot_be_spoken_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("swift_f0")
    (tmp_path / "site" / PACKAGE).mkdir(parents=True)
    (tmp_path / "site" / PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')\n")
    torch.manual_seed(0)
    torch.save({"model_state": VoiceEncoder().state_dict()}, tmp_path / "site" / PACKAGE / "pretrained.pt")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert evaluate(home, home / "speaks", tmp_path / "found") == ExitCode.DONE
    assert "2.wav is left out" in " ".join(capsys.readouterr().out.split())
    found = {row["measure"]: row["value"] for row in json.loads((tmp_path / "found" / "results.json").read_text())}
    assert list(found) == [
        "word error rate of recording, PocketSphinx with these words",
        "word error rate of recording through the vocoder, PocketSphinx with these words",
        "word error rate of text, PocketSphinx with these words",
        "mel-cepstral distortion, dB",
        "F0 error, semitones",
        "real-time factor",
        "speaker similarity of recordings of one speaker",
        "speaker similarity of text and recording",
    ]
    assert found["mel-cepstral distortion, dB"] > 1
    assert 0 < found["real-time factor"] < 5
    assert 0 < found["speaker similarity of text and recording"] <= 1
    assert 0 < found["speaker similarity of recordings of one speaker"] <= 1


def test_a_run_that_speaks_nothing_is_refused(
    home: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(home, saved, tmp_path / "found") == ExitCode.USAGE
    assert "the run has no head that speaks" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "found").exists()
