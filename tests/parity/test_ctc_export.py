"""Exported recognisers: transformers' pipeline writes the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.inference.ctc_decoding import greedy
from pretrain.interop.hf_export import export
from pretrain.recognition.recogniser import Recogniser
from pretrain.train_module import build_model
from tests.support.contract_cases import speech_like
from tests.support.parity_table import Parity

transformers = pytest.importorskip("transformers")
SYMBOLS = " 'abcé"
SMALL = {"dim": 48, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_positions_kernel": 16, "conv_positions_groups": 4}
STACK = {"positions": "conv_stack", "conv_positions_kernel": 19, "conv_positions_depth": 3}
LAYER = {"norm": "layer", "bias": True, "normalize": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Wav2Vec2ForCTC": ("none", {}, {}),
    "Wav2Vec2ForCTC, normalised": ("none", LAYER, {"norm": "pre"}),
    "WavLMForCTC": ("none", {}, {"relative_bias": True}),
    "Data2VecAudioForCTC": ("none", {"norm": "layer", "normalize": True}, STACK),
    "HubertForCTC": ("hubert", {}, {}),
}


def config(objective: str, frontend: dict[str, Any], encoder: dict[str, Any], **more: Any) -> Config:
    values = {
        "data": {"shards": "none"},
        "objective": {"name": objective},
        "frontend": {"name": "waveform_conv", "channels": 32} | frontend,
        "encoder": {"name": "transformer"} | SMALL | encoder,
        "heads": {"text": {"name": "ctc", "symbols": SYMBOLS}},
        "seed": 3,
    }
    return load(Config, values | more)


@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_of_transformers_writes_the_same_text(case: str, tmp_path: Path, parity: Parity) -> None:
    described = config(*CASES[case])
    module = build_model(described)
    with torch.no_grad():
        module.heads["text"].linear.weight.mul_(20)  # untrained outputs would be all alike
    parity(
        "export: ln p of CTC symbols, the gate's own comparison",
        1e-5,
        export(described, module, tmp_path / "out", "" if described.objective.name == "none" else "text"),
    )
    model, report = transformers.AutoModelForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == case.partition(",")[0]
    parity("export: keys missing or unexpected", 0, len(report["missing_keys"]) + len(report["unexpected_keys"]))
    ours = Recogniser(module.model.eval(), module.heads["text"].eval(), "run")
    recognise = transformers.pipeline("automatic-speech-recognition", str(tmp_path / "out"))
    for seed in range(2):
        wave = speech_like(3.0, seed).numpy().astype(np.float32)
        text = "".join(SYMBOLS[number] for number in greedy(ours.frames(wave)))
        assert len(set(text)) > 2
        theirs = recognise({"raw": wave, "sampling_rate": 16_000})["text"]
        assert theirs.split() == text.split()


def test_heads_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    two = config("none", {}, {}, heads={"one": {"name": "ctc"}, "other": {"name": "ctc"}})
    for described, head, said in (
        (two, "", "the CTC heads one, other; choose one with --head NAME"),
        (two, "on", r"--head on: .* \(did you mean one\?\); it has: one, other"),
        (config("hubert", {}, {}, heads={}), "text", "it has: none"),
        (config("none", {}, {}, heads={"text": {"name": "ctc", "symbols": "a|"}}), "", "the symbol '|'"),
        (config("none", {}, {}, heads={"text": {"name": "ctc", "layers": [1]}}), "", r"heads\.text\.layers=\[1\]"),
    ):
        with pytest.raises(ConfigError, match=said.replace("|", r"\|")):
            export(described, build_model(described), tmp_path / "out", head)
    assert not (tmp_path / "out").exists()
