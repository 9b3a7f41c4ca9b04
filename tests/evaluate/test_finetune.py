"""Fine-tuning to a recogniser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.main import main
from pretrain.adaptation.ctc_finetune import Recogniser
from pretrain.evaluate.frozen_encoders import open_pretrained

SYMBOLS = "abc"


def test_a_hugging_face_model_can_be_fine_tuned(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    tiny = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
    )  # fmt: skip
    transformers.Wav2Vec2Model(tiny).save_pretrained(tmp_path / "hub")
    net = Recogniser(open_pretrained(str(tmp_path / "hub")).model, SYMBOLS).eval()
    wave_BT, lengths_B = torch.randn(1, 16000), torch.tensor([16000])
    whole, _ = net(wave_BT, lengths_B)
    dropped, frames_B = net(wave_BT, lengths_B, torch.arange(49)[None] < 10)
    assert whole.shape == dropped.shape == (1, int(frames_B[0]), len(SYMBOLS) + 1)
    assert not torch.equal(whole, dropped)
    assert torch.equal(whole, net(wave_BT, lengths_B)[0])

    options = ["corpora=tones", "steps=8", "frozen_steps=2", "batch_seconds=6", "mask_time=0.05", "beam=0"]
    options += [f"manifest={corpus}/manifest.tsv", f"out={tmp_path / 'out'}"]
    assert main(["finetune", f"checkpoint={tmp_path / 'hub'}", *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["pretrained"]["model_type"] == "wav2vec2"
    assert [row["decoder"] for row in found["errors"]] == ["greedy"]


def test_fine_tuning_learns_to_transcribe_tones(corpus: Path, saved: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = ["corpora=tones", "steps=150", "frozen_steps=10", "lr=3e-3", "batch_seconds=6", "mask_time=0.05"]
    options += [f"manifest={corpus}/manifest.tsv", f"out={tmp_path}", "beam=8", "ngram=4"]
    assert main(["finetune", f"checkpoint={saved}", "task=ctc", *options]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    by = {row["decoder"]: row for row in found["errors"]}
    assert set(by) == {"greedy", "beam 8", "beam 8 + 4-gram"}
    assert all(row["utterances"] == 18 for row in by.values())
    assert by["beam 8 + 4-gram"]["wer"] < 0.7
    assert (tmp_path / "model.safetensors").exists()
