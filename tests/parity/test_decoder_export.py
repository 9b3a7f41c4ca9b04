"""Exported encoder-decoders: transformers' generation writes the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.text.tokenizer import load_tokenizer, write_tokens
from pretrain.config import Config
from pretrain.heads.sequence import Sequence
from pretrain.interop.hf_export import export
from pretrain.train_module import build_model
from tests.support.contract_cases import speech_like
from tests.support.parity_table import Parity

transformers = pytest.importorskip("transformers")
CHARACTERS = {"kind": "characters", "label": "text", "case": "lower", "symbols": [" ", "a", "b", "c", "é"]}
PAIRS = {
    "kind": "bpe", "label": "text", "case": "keep", "symbols": ["▁", "a", "b", "▁a", "ab"],
    "merges": [["▁", "a"], ["a", "b"]],
}  # fmt: skip
DECODER = {"layers": 2, "heads": 2, "ffn_dim": 40, "max_tokens": 12}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "learned positions": (CHARACTERS, {}, DECODER),
    "sines, another width, ReLU": (PAIRS, {}, DECODER | {"dim": 32, "positions": "sinusoidal", "activation": "relu"}),
    "WavLM, no output bias": (CHARACTERS, {"relative_bias": True}, DECODER | {"output_bias": False}),
}


def config(folder: Path, encoder: dict[str, Any], decoder: dict[str, Any], **head: Any) -> Config:
    values = {
        "data": {"shards": "none", "tokens": {"text": str(folder)}},
        "objective": {"name": "none"},
        "frontend": {"name": "waveform_conv", "channels": 32},
        "encoder": {
            "name": "transformer", "dim": 48, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_positions_kernel": 16,
            "conv_positions_groups": 4,
        } | encoder,
        "heads": {"text": {"name": "sequence", "vocabulary": 5, "decoder": decoder} | head},
        "seed": 3,
    }  # fmt: skip
    return load(Config, values)


def greedy(head: Sequence, memories: Any) -> list[int]:
    """Returns the most probable tokens one by one, at most as many as fit."""
    found: list[int] = []
    while len(found) < head.decoder.max_tokens - 1:
        logits_1NV = head.decoder(torch.tensor([[head.start, *found]]), memories)
        token = int(logits_1NV[0, -1].argmax())
        if token == head.end:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_generation_of_transformers_writes_the_same_text(case: str, tmp_path: Path, parity: Parity) -> None:
    tokens, encoder, decoder = CASES[case]
    write_tokens(str(tmp_path / "tokens"), tokens)
    described = config(tmp_path / "tokens", encoder, decoder)
    module = build_model(described)
    head = module.heads["text"]
    assert isinstance(head, Sequence)
    with torch.no_grad():
        head.decoder.out.weight.mul_(8)  # untrained outputs would be all alike
        if head.decoder.out.bias is not None:
            head.decoder.out.bias.normal_()
    error = export(described, module, tmp_path / "out")
    parity("export: ln p of an attention decoder's tokens, the gate's own comparison", 1e-5, error)
    model, report = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    parity("export: keys missing or unexpected", 0, len(report["missing_keys"]) + len(report["unexpected_keys"]))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, texts = load_tokenizer(str(tmp_path / "tokens")), set()
    for seed in range(2):
        wave_T = speech_like(1.0, seed)
        with torch.no_grad():
            encoded = module.eval().model(wave_T[None], torch.tensor([len(wave_T)]))
            text = ours.decode(greedy(head, head.memories(encoded)))
        inputs = extractor(wave_T.numpy(), sampling_rate=16_000, return_tensors="pt")
        generated = model.eval().generate(inputs.input_values, num_beams=1, do_sample=False)
        assert tokenizer.decode(generated[0], skip_special_tokens=True) == text
        texts.add(text)
    assert max(map(len, texts)) > 2
    sentence = "ab a"
    assert tokenizer(sentence, add_special_tokens=False).input_ids == ours.encode(sentence)


def test_decoders_without_a_counterpart_are_named(tmp_path: Path) -> None:
    write_tokens(str(tmp_path / "tokens"), CHARACTERS)
    wide = {**CHARACTERS, "symbols": [chr(200 + number) for number in range(60)]}
    write_tokens(str(tmp_path / "wide"), wide)
    for described, said in (
        (config(tmp_path / "tokens", {}, DECODER, layers=[1]), r"heads\.text\.layers=\[1\]"),
        (config(tmp_path / "tokens", {}, DECODER, memory_layers=[1, 2]), r"heads\.text\.memory_layers=\[1, 2\]"),
        (config(tmp_path / "wide", {}, DECODER, vocabulary=60), r"heads\.text\.decoder\.output_bias=true: .*=false"),
        (config(tmp_path / "tokens", {}, DECODER, tokens="phones"), r"heads\.text\.tokens=phones"),
    ):
        module = build_model(described)
        torch.nn.init.normal_(module.heads["text"].decoder.out.bias)
        with pytest.raises(ConfigError, match=said):
            export(described, module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
