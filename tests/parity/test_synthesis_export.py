"""A synthesis head as ONNX graphs, in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.text.tokenizer import Tokenizer, write_tokens
from pretrain.heads import synthesis
from pretrain.interfaces.models import ModelShape
from pretrain.interop.synthesis_export import export_synthesis
from pretrain.models.synthesis.synthesizer import AS_LEARNED
from tests.support.contract_cases import SYNTHESIZER
from tests.support.parity_table import Parity, difference

SHAPE = ModelShape(16, 2, 40, 100.0, 50.0)


def head_of(**more: object) -> synthesis.Synthesis:
    torch.manual_seed(0)
    values = {"name": "synthesis", "vocabulary": 5, "n_mels": 20, "pitch": "pitch", "synthesizer": SYNTHESIZER} | more
    return synthesis.build(load(synthesis.Config, values), SHAPE).eval()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return write_tokens(
        str(tmp_path / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": [*" abcd"]}
    )


@pytest.mark.slow
def test_the_exported_graphs_speak_as_the_head_does(tokenizer: Tokenizer, tmp_path: Path, parity: Parity) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    head = head_of()
    error = export_synthesis(head, tokenizer, tmp_path / "out", "run")
    parity("synthesis in onnxruntime, audio", 1e-4, error)
    described = json.loads((tmp_path / "out" / "synthesis.json").read_text())
    ids = [described["first_mark"], *tokenizer.encode("bad cab"), described["last_mark"]]
    text, audio = (runtime.InferenceSession(str(tmp_path / "out" / name)) for name in ("text.onnx", "audio.onnx"))
    given = {"tokens": np.array([ids]), "controls": np.array([1, 0, 0], np.float32)}
    durations, vectors = text.run(None, given)
    wave_1T = audio.run(None, {"durations": durations, "vectors": vectors, "places": np.arange(durations.sum())})[0]
    with torch.no_grad():
        mel = head.speak(torch.tensor([tokenizer.encode("bad cab")]), None, AS_LEARNED)
        assert head.synthesizer.vocoder is not None
        expected_1T = head.synthesizer.vocoder(mel.x_BFD, mel.lengths_B)
    parity("synthesis in onnxruntime, audio", 1e-4, difference(torch.from_numpy(wave_1T), expected_1T))


def test_a_head_without_a_vocoder_has_nothing_to_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained without a vocoder"):
        export_synthesis(head_of(synthesizer=SYNTHESIZER | {"vocoder": None}), tokenizer, tmp_path / "out", "run")
    assert not (tmp_path / "out").exists()
