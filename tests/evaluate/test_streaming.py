"""task=streaming: the figures are those of streams, for each chunk length and left context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.streaming import Streamed, settings, stream
from pretrain.interfaces.streaming import StreamingEncoder
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from tests.support.contract_cases import speech_like
from tests.support.training import STREAMING_RECOGNISER, save


def evaluate_config(**fields: object) -> EvaluateConfig:
    return load(EvaluateConfig, {"checkpoint": "x", "streaming": fields})


def test_an_utterance_is_pushed_in_parts(recogniser: Recogniser) -> None:
    model, wave_T = StreamingRecogniser(recogniser, None, 4, 2), speech_like(3.0, 3)
    found = Streamed()
    stream(model, wave_T, 1_600, found)
    assert len(found.pushes) == 30 + 1
    assert found.audio == 3.0
    state, [first] = model.push(model.start(), [wave_T])
    _, [last] = model.finish(state)
    words = [*first.words, *last.words]
    assert found.texts == [" ".join(word.text for word in words)]
    assert len(found.emission) == len(words) > 2
    assert all(-0.05 <= delay <= 3.0 for delay in found.emission)
    assert found.state_bytes == pytest.approx(state.stream.bytes, rel=0.3)


def test_settings_are_those_trained_or_asked_for(recogniser: Recogniser) -> None:
    encoder = recogniser.model.encoder
    assert isinstance(encoder, StreamingEncoder)
    assert settings(evaluate_config(), encoder) == [(4, 2), (4, -1), (8, 2), (8, -1)]
    assert settings(evaluate_config(chunks="8", left="-1,2"), encoder) == [(8, -1), (8, 2)]
    with pytest.raises(ConfigError, match="chunk=5: the encoder was trained with 4, 8"):
        settings(evaluate_config(chunks="5"), encoder)
    with pytest.raises(ConfigError, match=r"streaming\.left=all: must be numbers"):
        settings(evaluate_config(left="all"), encoder)


def test_the_command_reports_each_setting(
    corpus: Path, streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, *lines = (line.split("\t") for line in (corpus / "manifest.tsv").read_text(encoding="utf-8").splitlines())
    rows = [["ab ba" if name == "text" else cell for name, cell in zip(head, line, strict=True)] for line in lines]
    texts = "".join("\t".join(row) + "\n" for row in (head, *rows))
    (corpus / "texts.tsv").write_text(texts, encoding="utf-8")
    given = ["task=streaming", "corpora=tones", f"manifest={corpus}/texts.tsv", f"runs={tmp_path}", "name=s"]
    given += ["max_utterances=3", "streaming.chunks=4", "streaming.left=2", f"out={tmp_path / 'out'}"]
    assert main(["evaluate", f"checkpoint={streaming_run}", *given]) == ExitCode.DONE
    measured = {row["measure"]: row for row in json.loads((tmp_path / "out" / "results.json").read_bytes())}
    assert measured["algorithmic delay, ms, chunk 4, left 2"]["value"] == pytest.approx(175)
    assert (
        measured["push, ms, p95, chunk 4, left 2"]["value"] >= measured["push, ms, p50, chunk 4, left 2"]["value"] > 0
    )
    assert measured["state, kB, chunk 4, left 2"]["value"] > 5
    assert measured["computing, ms per second of audio, chunk 4, left 2"]["value"] < 1_000
    assert {"word error rate, whole recordings", "word error rate, chunk 4, left 2"} <= measured.keys()
    assert "chunk 4, left 2" in capsys.readouterr().out


def test_a_recogniser_that_cannot_stream_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "offline", 4, heads=STREAMING_RECOGNISER["heads"])
    given = ["task=streaming", "corpora=tones", f"manifest={corpus}/manifest.tsv", f"runs={tmp_path}", "name=s"]
    assert main(["evaluate", f"checkpoint={tmp_path / 'offline'}", *given]) == ExitCode.USAGE
    assert "this model cannot stream: frontend.normalize=utterance" in capsys.readouterr().err
