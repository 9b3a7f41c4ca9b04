"""Parts of the synthesiser against transformers, torch, SciPy and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.models.synthesis.aligner import best_durations, beta_binomial, forward_sum
from pretrain.models.synthesis.variance import VariancePredictor, regulate
from pretrain.models.synthesis.vocoder import FFT, InverseSTFT
from tests.support.parity_table import Parity, difference

TEXTS = torch.tensor([5, 3])


def theirs() -> tuple[object, object]:
    """transformers' module of FastSpeech2Conformer, and a small configuration of it."""
    modeling = pytest.importorskip("transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer")
    configuration = pytest.importorskip("transformers").FastSpeech2ConformerConfig(
        hidden_size=16,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        duration_predictor_channels=24,
        duration_predictor_dropout_rate=0.0,
    )
    return modeling, configuration


@pytest.mark.parametrize("kind", ["variance", "duration"])
def test_predictors_equal_those_of_transformers(kind: str, parity: Parity) -> None:
    modeling, configuration = theirs()
    torch.manual_seed(0)
    if kind == "variance":
        other = modeling.FastSpeech2ConformerVariancePredictor(configuration, 2, 24, 3, 0.0)  # type: ignore[attr-defined]
    else:
        other = modeling.FastSpeech2ConformerDurationPredictor(configuration)  # type: ignore[attr-defined]
    ours = VariancePredictor(16, 24, 3, 0.0)
    for number in range(2):
        ours.convs[number].load_state_dict(other.conv_layers[number].conv.state_dict())
        ours.norms[number].load_state_dict(other.conv_layers[number].layer_norm.state_dict())
    ours.out.load_state_dict(other.linear.state_dict())
    x_BND = torch.randn(2, 5, 16)
    found_BN = ours(x_BND, torch.ones(2, 5, dtype=torch.bool))
    wanted_BN = other.train()(x_BND)
    parity("predictors of FastSpeech 2 (transformers)", 1e-5, difference(found_BN, wanted_BN.reshape(2, 5)))


def test_the_length_regulator_equals_that_of_transformers(parity: Parity) -> None:
    modeling, _ = theirs()
    torch.manual_seed(0)
    x_BND, durations_BN = torch.randn(3, 6, 4), torch.randint(0, 5, (3, 6))
    wanted_BFD = modeling.length_regulator(x_BND, durations_BN.clone())  # type: ignore[attr-defined]
    found_BFD = regulate(x_BND, durations_BN, wanted_BFD.shape[1])
    parity("length regulator of FastSpeech 2 (transformers)", 0.0, difference(found_BFD, wanted_BFD))


def paths(frames: int, tokens: int) -> list[tuple[int, ...]]:
    """All monotonic paths of `frames` frames that visit each of `tokens` tokens."""
    return [
        tuple(np.repeat(np.arange(tokens), np.diff((0, *cuts, frames))))
        for cuts in itertools.combinations(range(1, frames), tokens - 1)
    ]


def alignment() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    tokens_B, frames_B = torch.tensor([4, 2, 1]), torch.tensor([8, 7, 3])
    log_BFN = torch.randn(3, 8, 4).mul(2).masked_fill(torch.arange(4) >= tokens_B[:, None, None], -1e4)
    return log_BFN, tokens_B, frames_B


def test_the_best_alignment_equals_enumeration(parity: Parity) -> None:
    log_BFN, tokens_B, frames_B = alignment()
    found_BN = best_durations(log_BFN, tokens_B, frames_B)
    for row, (tokens, frames) in enumerate(zip(tokens_B.tolist(), frames_B.tolist(), strict=True)):
        score = {path: sum(float(log_BFN[row, f, k]) for f, k in enumerate(path)) for path in paths(frames, tokens)}
        best = max(score, key=lambda path: score[path])
        wanted_N = torch.bincount(torch.tensor(best), minlength=4)
        parity("best monotonic alignment (enumeration)", 0.0, difference(found_BN[row].float(), wanted_N.float()))


def test_the_sum_over_alignments_equals_enumeration(parity: Parity) -> None:
    log_BFN, tokens_B, frames_B = alignment()
    found_B = forward_sum(log_BFN, tokens_B, frames_B)
    for row, (tokens, frames) in enumerate(zip(tokens_B.tolist(), frames_B.tolist(), strict=True)):
        log_FN = log_BFN[row].double()
        scores = [log_FN[torch.arange(frames), torch.tensor(path)].sum() for path in paths(frames, tokens)]
        wanted = -torch.stack(scores).logsumexp(0)
        parity("sum over alignments (enumeration)", 1e-5, difference(found_B[row].double(), wanted))


def test_the_prior_equals_that_of_scipy(parity: Parity) -> None:
    stats = pytest.importorskip("scipy.stats")
    frames_B, tokens_B = torch.tensor([9, 5]), torch.tensor([4, 2])
    found_BFN = beta_binomial(frames_B, tokens_B, 9, 4)
    for row, (frames, tokens) in enumerate(((9, 4), (5, 2))):
        wanted = [
            [stats.betabinom.logpmf(k, tokens - 1, f, frames + 1 - f) for k in range(tokens)]
            for f in range(1, frames + 1)
        ]
        part = found_BFN[row, :frames, :tokens]
        parity("beta-binomial prior (scipy)", 1e-5, difference(part, torch.tensor(wanted, dtype=torch.float32)))


def test_the_inverse_transform_equals_that_of_torch(parity: Parity) -> None:
    torch.manual_seed(0)
    window, hop, frames = 400, 160, 12
    spectra_BKF = torch.randn(2, FFT // 2 + 1, frames, dtype=torch.complex64)
    spectra_BKF[:, [0, -1]] = spectra_BKF[:, [0, -1]].real.to(torch.complex64)
    valid_BF = torch.ones(2, frames, dtype=torch.bool)
    inverse = InverseSTFT(window, hop)
    found_BT = inverse(spectra_BKF.real.transpose(1, 2), spectra_BKF.imag.transpose(1, 2), valid_BF)
    assert found_BT.shape == (2, hop * (frames - 1) + window)
    wanted_BT = torch.istft(spectra_BKF, FFT, hop, window=torch.hann_window(FFT), center=True)
    inner_BT = found_BT[:, window // 2 : -window // 2]  # torch leaves out half a window on either side
    parity("inverse STFT (torch)", 1e-5, difference(inner_BT, wanted_BT))


def test_rows_without_all_frames_are_transformed_as_if_alone() -> None:
    torch.manual_seed(0)
    real, imaginary = torch.randn(2, 1, 9, FFT // 2 + 1).unbind()
    valid_BF = torch.arange(9)[None] < 5
    kept = valid_BF[:, :, None]
    inverse = InverseSTFT(400, 160)
    padded_1T = inverse(real * kept, imaginary * kept, valid_BF)
    alone_1T = inverse(real[:, :5], imaginary[:, :5], valid_BF[:, :5])
    torch.testing.assert_close(padded_1T[:, : alone_1T.shape[1]], alone_1T)
