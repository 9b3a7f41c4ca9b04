"""Encoders of Hugging Face folders, each a tiny random model: the hidden states that transformers itself gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.evaluate import hf_encoder
from pretrain.evaluate.frozen_encoders import open_encoder

transformers = pytest.importorskip("transformers")
WAVE = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
DATA2VEC = {
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 2,
    "conv_pos_kernel_size": 3,
    "num_conv_pos_embedding_groups": 4,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2", SMALL | CONVOLUTIONS),
    "hubert": ("Hubert", SMALL | CONVOLUTIONS),
    "wavlm": ("WavLM", SMALL | CONVOLUTIONS),
    "data2vec-audio": ("Data2VecAudio", SMALL | DATA2VEC),
    "wav2vec2-bert": ("Wav2Vec2Bert", SMALL | {"feature_projection_input_dim": 160, "add_adapter": False}),
    "whisper": (
        "Whisper",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "vocab_size": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "max_source_positions": 50,
            "max_target_positions": 20,
            "num_mel_bins": 80,
        },
    ),
}


def saved(kind: str, folder: Path) -> Any:
    """Saves a tiny model and returns it."""
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)).eval()
    net.save_pretrained(folder)
    return net


def expected(kind: str, net: Any, wave: np.ndarray) -> list[torch.Tensor]:
    """Returns the hidden states by transformers' own feature extractors."""
    if kind == "whisper":
        extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
        features = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
        return list(net.encoder(features, output_hidden_states=True).hidden_states)
    if kind == "wav2vec2-bert":
        extractor = transformers.SeamlessM4TFeatureExtractor()
        features = extractor(wave, sampling_rate=16_000, return_tensors="pt", pad_to_multiple_of=None).input_features
        return list(net(features, output_hidden_states=True).hidden_states)
    return list(net(torch.from_numpy(wave)[None], output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    net = saved(kind, tmp_path / "hub")
    encoder = open_encoder(str(tmp_path / "hub"))
    assert encoder.rate_hz == 50.0
    found_LFD = encoder.encode(torch.from_numpy(WAVE))
    with torch.inference_mode():
        states = expected(kind, net, WAVE)
    assert len(found_LFD) == len(states) == 3
    assert abs(found_LFD.shape[1] - len(WAVE) / 320) <= 1.5
    for ours_FD, theirs_1FD in zip(found_LFD, states, strict=True):
        assert torch.allclose(ours_FD, theirs_1FD[0, : len(ours_FD)], atol=1e-5)
    assert encoder.fresh is not None
    first, again, other = (
        torch.cat([weight.flatten() for weight in encoder.fresh(seed).parameters()]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-bert"])
def test_models_on_spectra_are_trained_and_padding_does_not_change_them(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "hub")
    model = hf_encoder.load(tmp_path / "hub").eval()
    wave_BT = torch.from_numpy(np.stack([WAVE, WAVE[::-1].copy()]))
    wave_BT[1, 8_000:] = 0
    together = model(wave_BT, torch.tensor([12_000, 8_000]))
    alone = model(wave_BT[1:, :8_000], torch.tensor([8_000]))
    frames = int(alone.lengths_B[0])
    assert torch.allclose(together.final.x_BFD[1, :frames], alone.final.x_BFD[0, :frames], atol=1e-5)
    together.final.x_BFD.square().sum().backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    assert open_encoder(str(tmp_path / "hub")).encode(torch.zeros(10)).shape[1] >= 1


def test_whisper_reads_long_audio_in_windows_and_a_folder_with_its_encoder_alone(tmp_path: Path) -> None:
    saved("whisper", tmp_path / "hub")
    long = torch.from_numpy(np.tile(WAVE, 2))  # 1.5 s, and windows of 1 s
    encoder = open_encoder(str(tmp_path / "hub"))
    found_LFD = encoder.encode(long)
    assert found_LFD.shape[1] == 75
    assert torch.allclose(found_LFD[:, :50], encoder.encode(long[:16_000]), atol=1e-5)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "hub" / "model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if not name.startswith("decoder")}, file)
    assert torch.equal(open_encoder(str(tmp_path / "hub")).encode(long), found_LFD)


def test_a_model_without_a_known_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type=bert has no waveform stem"):
        open_encoder(str(tmp_path))
