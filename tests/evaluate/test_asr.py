"""Error rates of recognisers: edits by jiwer, tallies by speaker, and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.text.tokenizer import write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.asr import by_speaker, parts
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.manifest import read_manifest
from pretrain.recognition import error_rates
from pretrain.recognition.error_rates import edits, errors, written
from tests.support.training import save

REFERENCES = ["the cat sat", "on the mat", "a", "one two three four"]
TEXTS = ["the hat sat down", "", "a", "one three four five"]


def test_rates_over_all_utterances_are_those_of_jiwer() -> None:
    found = errors("greedy", REFERENCES, TEXTS)
    assert found.wer == pytest.approx(jiwer.wer(REFERENCES, TEXTS))
    assert found.cer == pytest.approx(jiwer.cer(REFERENCES, TEXTS))
    assert edits(REFERENCES, TEXTS, by_words=True) == [(2, 3), (3, 3), (0, 1), (2, 4)]


def test_texts_are_compared_in_the_symbols_of_the_recogniser() -> None:
    assert written("  The  Cat-\tsat! ", " acehst") == "the catsat"


def test_speakers_and_splits(corpus: Path) -> None:
    utterances = read_manifest(corpus / "manifest.tsv")
    config = EvaluateConfig(checkpoint="x", corpora="tones", max_utterances=9)
    train, asked = parts(config, utterances)
    assert {u.split for u in train} == {"train"}
    assert len(asked) == 9
    tally = by_speaker(asked, [(1, 4)] * 9)
    assert sum(trials for _, trials in tally.values()) == 36
    assert tally.keys() == {"speaker4", "speaker5"}
    everything = EvaluateConfig(checkpoint="x", max_utterances=9)
    assert parts(everything, utterances) == (train, asked)  # of all corpora
    with pytest.raises(ConfigError, match="no text in split ask=test of corpora=other; the manifest has the corpora: "):
        parts(EvaluateConfig(checkpoint="x", corpora="other"), utterances)


def test_error_rates_of_an_attention_decoder_alone(corpus: Path, tmp_path: Path) -> None:
    tokens = {"kind": "characters", "label": "text", "case": "lower", "symbols": list(" abcdefghijklmnopqrstuvwxyz")}
    write_tokens(str(tmp_path / "tokens"), tokens)
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(tmp_path / "tokens")}}
    decoder = {"layers": 1, "heads": 2, "ffn_dim": 32, "max_tokens": 12}
    heads = {"text": {"name": "sequence", "vocabulary": 27, "decoder": decoder}}
    save(tmp_path / "run", 4, heads=heads, data=data)
    given = ["task=asr", "corpora=tones", f"manifest={corpus}/manifest.tsv", f"out={tmp_path}/rates"]
    assert (
        main(["evaluate", f"checkpoint={tmp_path / 'run'}", *given, "max_utterances=2", "asr.beam=2"]) == ExitCode.DONE
    )
    rows = json.loads((tmp_path / "rates" / "results.json").read_text())
    measures = [f"{unit} error rate, {decoder}" for decoder in ("greedy", "beam 2") for unit in ("word", "character")]
    assert [row["measure"] for row in rows] == measures
    assert all(row["value"] > 0 for row in rows)
    refused = ["max_utterances=2", f"asr.lm={tmp_path}/words.arpa"]
    assert main(["evaluate", f"checkpoint={tmp_path / 'run'}", *given, *refused]) == ExitCode.USAGE


def test_a_run_without_a_head_is_refused(corpus: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["task=asr", "corpora=tones", f"manifest={corpus}/manifest.tsv", f"runs={saved.parent}", "name=asr"]
    assert main(["evaluate", f"checkpoint={saved}", *given]) == ExitCode.USAGE
    assert "the run has no head that recognises speech" in capsys.readouterr().err


def test_a_missing_jiwer_is_reported_before_anything_is_computed(
    corpus: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(error_rates.importlib.util, "find_spec", lambda name: None)
    given = [f"manifest={corpus}/manifest.tsv", f"checkpoint={saved}"]
    for command in (
        ["evaluate", "task=asr"],
        ["evaluate", "task=transcripts"],
        ["finetune", f"out={corpus.parent / 'unused'}"],
    ):
        assert main([*command, *given]) == ExitCode.USAGE
        assert "pip install jiwer" in capsys.readouterr().err
    assert not (corpus.parent / "unused").exists()
