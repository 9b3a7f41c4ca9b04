"""Conformer, rotary positions, MFCC, whitening, U-shape and multi-scale front end against libraries or NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.interfaces.frames import Frames
from pretrain.models.encoders import conformer, transformer
from pretrain.models.frontends import multiscale
from pretrain.nn.half_rate import HalfRate
from pretrain.nn.positions import rotary_angles, rotate
from pretrain.nn.spectral import LogMel, TorchaudioMfcc, delta
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer
from tests.support.hugging_face import randomize
from tests.support.parity_table import Parity, difference


class NormOverChannels(nn.LayerNorm):
    """Our layer norm over channels in place of transformers' batch norm."""

    def forward(self, x_BDF: Tensor) -> Tensor:
        return super().forward(x_BDF.transpose(1, 2)).transpose(1, 2)


def conformer_names(name: str) -> str:
    """Returns the names of our block's weights in transformers' Wav2Vec2ConformerEncoderLayer."""
    for ours, theirs in (
        ("ffn_first.0", "ffn1_layer_norm"),
        ("ffn_first.1", "ffn1.intermediate_dense"),
        ("ffn_first.4", "ffn1.output_dense"),
        ("ffn_second.0", "ffn2_layer_norm"),
        ("ffn_second.1", "ffn2.intermediate_dense"),
        ("ffn_second.4", "ffn2.output_dense"),
        ("attention_norm", "self_attn_layer_norm"),
        ("attention.out", "self_attn.linear_out"),
        ("convolution.norm", "conv_module.layer_norm"),
        ("convolution.gated", "conv_module.pointwise_conv1"),
        ("convolution.depthwise_norm", "conv_module.batch_norm"),
        ("convolution.depthwise", "conv_module.depthwise_conv"),
        ("convolution.out", "conv_module.pointwise_conv2"),
        ("norm", "final_layer_norm"),
    ):
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    raise KeyError(name)


@pytest.mark.parametrize("kernel", [31, 9], ids=["Conformer", "FastConformer"])
def test_conformer_blocks_equal_those_of_transformers(kernel: int, parity: Parity) -> None:
    """Outputs and gradients, without positions; with a layer norm for their batch norm and no biases where they have
    none."""
    modeling = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    configuration = pytest.importorskip("transformers").Wav2Vec2ConformerConfig(
        hidden_size=48, num_attention_heads=4, intermediate_size=96, hidden_act="swish", position_embeddings_type=None,
        conv_depthwise_kernel_size=kernel, attn_implementation="eager",
    )  # fmt: skip
    config = conformer.Config(dim=48, layers=2, heads=4, ffn_dim=96, kernel=kernel, positions="none", layer_drop=0.0)
    ours = conformer.build(config).eval()
    randomize(ours)
    theirs = nn.ModuleList(modeling.Wav2Vec2ConformerEncoderLayer(configuration) for _ in range(2))
    for layer, block in zip(theirs, ours.blocks, strict=True):
        layer.conv_module.batch_norm = NormOverChannels(48)
        state: dict[str, Tensor] = {}
        for name, weight in block.state_dict().items():
            if name.startswith("attention.qkv"):
                parts = zip("qkv", weight.chunk(3), strict=True)
                state |= {f"self_attn.linear_{part}.{name.rpartition('.')[2]}": third for part, third in parts}
            elif name in ("convolution.gated.bias", "convolution.out.bias", "convolution.depthwise.bias"):
                weight.zero_()
            else:
                renamed = conformer_names(name)
                state[renamed] = weight[:, :, None] if "pointwise" in renamed else weight
        layer.load_state_dict(state)
    theirs.eval()
    x_BFD = torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = ours(Frames(x_BFD, torch.tensor([50, 50]), 25.0)).final.x_BFD
    (mine,) = torch.autograd.grad(found.square().sum(), x_BFD)
    expected = x_BFD
    for layer in theirs:
        out = layer(expected)
        expected = out[0] if isinstance(out, tuple) else out
    (other,) = torch.autograd.grad(expected.square().sum(), x_BFD)
    parity("Conformer and FastConformer blocks against transformers", 1e-5, difference(found, expected))
    parity("Conformer and FastConformer: gradients against transformers", 1e-4, difference(mine, other))


def test_rotary_positions_equal_those_of_llama(parity: Parity) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=128, num_attention_heads=2)
    q, k = torch.randn(2, 2, 2, 700, 64, generator=torch.Generator().manual_seed(0))
    places = torch.arange(700)
    expected = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, places[None]))
    angles = rotary_angles(places, 64)
    for mine, other in zip((rotate(q, *angles), rotate(k, *angles)), expected, strict=True):
        # both round the angle, which grows with the position
        parity("rotary positions of 700 frames against transformers' Llama", 1e-4, difference(mine, other))


@pytest.mark.parametrize(("n_mels", "window"), [(23, 400), (40, 1024)], ids=["HuBERT", "multiscale"])
def test_mfcc_equal_those_of_torchaudio(n_mels: int, window: int, parity: Parity) -> None:
    """Cepstra, Δ and ΔΔ, normalised over the utterance; both repeat edge frames for Δ."""
    transforms = pytest.importorskip("torchaudio.transforms")
    functional = pytest.importorskip("torchaudio.functional")
    wave_BT = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    ours = TorchaudioMfcc(n_mels, window)
    n_fft = ours.mel.n_fft
    options = {"n_fft": n_fft, "win_length": window, "hop_length": 160, "n_mels": n_mels, "center": False}
    theirs = transforms.MFCC(16_000, n_mfcc=13, log_mels=True, melkwargs=options)(wave_BT)
    start = (n_fft - window) // 2  # torchaudio centres its window in the FFT
    heard = window + 160 * (theirs.shape[2] - 1)
    found = ours(wave_BT[:, start : start + heard], torch.tensor([heard] * 2)).x_BFD
    first = functional.compute_deltas(theirs)
    expected = torch.cat([theirs, first, functional.compute_deltas(first)], dim=1).transpose(1, 2)
    expected = (
        expected - expected.mean(1, keepdim=True)
    ) / LogMel.STD  # loud enough for the norm's eps to be negligible
    expected = expected / (expected.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    parity("MFCC, Δ and ΔΔ against torchaudio", 1e-4, difference(found, expected))


def test_delta_equals_that_of_torchaudio(parity: Parity) -> None:
    functional = pytest.importorskip("torchaudio.functional")
    x_BFD = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    found = delta(x_BFD, torch.tensor([30, 21]))
    for row, length in enumerate((30, 21)):
        expected = functional.compute_deltas(x_BFD[row : row + 1, :length].transpose(1, 2)).transpose(1, 2)
        parity("Δ of ragged rows against torchaudio", 1e-5, difference(found[row : row + 1, :length], expected))


def test_whitening_equals_that_of_scikit_learn(parity: Parity) -> None:
    """Axes are equal up to their sign."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4000, 40, generator=generator) @ torch.randn(40, 40, generator=generator) + 3
    quantizer = RandomProjectionQuantizer(40, 8, 16)
    quantizer.whiten(x_ND)
    mine = ((x_ND - quantizer.mean_D) @ quantizer.projection_DC).flip(1).numpy()
    theirs = decomposition.PCA(8, whiten=True, svd_solver="full").fit_transform(x_ND.double().numpy())
    signs = np.sign((mine * theirs).sum(0))
    parity("PCA whitening against scikit-learn", 1e-4, float(np.abs(mine * signs - theirs).max()))


def test_u_shape_equals_a_numpy_computation(parity: Parity) -> None:
    """Frame pairs are joined by a linear layer, run at half the rate, split and added back; also for an odd length."""
    sizes: dict[str, Any] = {"dim": 16, "layers": 3, "heads": 2, "ffn_dim": 24, "positions": "none", "layer_drop": 0.0}
    ours = transformer.build(transformer.Config(**sizes, half_rate_blocks=1, norm="pre")).eval()
    randomize(ours)
    assert isinstance(ours.half_rate, HalfRate)
    x_FD = torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(0))
    found = ours(Frames(x_FD, torch.tensor([13]), 25.0))

    def block(number: int, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        plain = transformer.build(transformer.Config(**sizes | {"layers": 1}, norm="pre")).eval()
        plain.blocks[0].load_state_dict(ours.blocks[number].state_dict())
        plain.norm = nn.Identity()  # type: ignore[assignment]
        given = torch.from_numpy(x)[None].float()
        out: np.ndarray[Any, Any] = plain(Frames(given, torch.tensor([len(x)]), 1.0)).final.x_BFD[0].detach().numpy()
        return out

    join, part = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (ours.half_rate.join, ours.half_rate.part)
    )
    fine = block(0, x_FD[0].numpy())
    pairs = np.concatenate([fine, np.zeros((1, 16), np.float32)]).reshape(7, 32)
    coarse = block(1, pairs @ join[0].T + join[1])
    fine = fine + (coarse @ part[0].T + part[1]).reshape(14, 16)[:13]
    last = F.layer_norm(torch.from_numpy(block(2, fine)), (16,), ours.norm.weight, ours.norm.bias)
    parity("U-shape against NumPy", 1e-5, difference(found.layers[2][0], torch.from_numpy(fine)))
    parity("U-shape against NumPy", 1e-5, difference(found.final.x_BFD[0], last))


def test_multiscale_front_end_equals_a_numpy_computation(parity: Parity) -> None:
    """Each branch is computed alone, at its own window centre: normalised, stacked, projected, and softmax-mixed."""
    ours = multiscale.build(multiscale.Config(wave_channels=24, dropout=0.0), 32).eval()
    randomize(ours)
    wave_BT = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    found = ours.project(ours.extract(wave_BT, torch.tensor([8_000]))).x_BFD[0].detach().numpy()
    mel = LogMel(80)(wave_BT, torch.tensor([8_000])).x_BFD[0]
    n_frames = len(mel)
    around = F.pad(wave_BT, (312, 312))  # (1024 - 400) / 2 samples on each side
    mfcc = TorchaudioMfcc(40, 1024)(around, torch.tensor([8_624])).x_BFD[0, :n_frames]
    x_1DT = F.pad(wave_BT, (0, 800))[:, None]
    for conv, norm, stride in zip(ours.wave.convs, ours.wave.norms, (5, 4, 2, 4), strict=True):
        y_1DT = F.conv1d(x_1DT, conv.weight, conv.bias, stride).transpose(1, 2)
        x_1DT = F.gelu(F.layer_norm(y_1DT, (24,), norm.weight, norm.bias)).transpose(1, 2)
    branches, projected = [mel, mfcc, x_1DT[0].T[:n_frames]], []
    normed = []
    for branch, norm, linear in zip(branches, ours.norms, ours.linears, strict=True):
        stacked = branch.detach().numpy()[: n_frames // 4 * 4].reshape(n_frames // 4, -1).astype(np.float64)
        stacked = (stacked - stacked.mean(1, keepdims=True)) / np.sqrt(stacked.var(1, keepdims=True) + 1e-5)
        normed.append(stacked * norm.weight.detach().numpy() + norm.bias.detach().numpy())
        projected.append(normed[-1] @ linear.weight.detach().numpy().T + linear.bias.detach().numpy())
    scores = np.concatenate(normed, axis=1) @ ours.gate.weight.detach().numpy().T + ours.gate.bias.detach().numpy()
    gates = np.exp(scores - scores.max(1, keepdims=True))
    gates /= gates.sum(1, keepdims=True)
    expected = sum(gate[:, None] * view for gate, view in zip(gates.T, projected, strict=True))
    parity("multi-scale front end against NumPy", 1e-5, float(np.abs(found - expected).max()))
