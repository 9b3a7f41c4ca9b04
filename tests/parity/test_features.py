"""Features, augmentation, code look-ups and relative position buckets against torchaudio, NumPy and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.audio.transforms import add_noise, reverberate
from data_pipeline.labels.features import kaldi_mfcc
from pretrain.nn.attention import RelativeBias
from pretrain.nn.spectral import LogMel, TorchaudioMfcc, mel_filters
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer
from tests.support.parity_table import Parity, difference


def test_mel_filters_equal_those_of_torchaudio(parity: Parity) -> None:
    functional = pytest.importorskip("torchaudio.functional")
    for n_fft, n_mels in ((512, 80), (512, 40), (1024, 64)):
        theirs = functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 8000.0, n_mels, 16_000)
        parity("mel filters against torchaudio", 1e-5, float((mel_filters(n_fft, n_mels) - theirs).abs().max()))


def test_log_mel_equals_that_of_torchaudio(parity: Parity) -> None:
    transforms = pytest.importorskip("torchaudio.transforms")
    wave_BT = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    spectrum = transforms.MelSpectrogram(16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80, center=False)
    ours = LogMel(normalize="fixed")
    # torchaudio centres its window in the FFT: its frame f covers ours shifted by (512 - 400) / 2 samples
    mine = ours(wave_BT[:, 56:], torch.tensor([16_000 - 56] * 2)).x_BFD * ours.STD + ours.MEAN
    theirs = torch.log(spectrum(wave_BT).transpose(1, 2) + ours.FLOOR)
    parity("log-mel against torchaudio", 1e-4, float((mine[:, : theirs.shape[1]] - theirs).abs().max()))


def test_the_dct_of_mfcc_equals_its_definition(parity: Parity) -> None:
    """Compares with the orthonormal DCT-II in double precision."""
    mels = np.arange(23) + 0.5
    dct_MC = np.cos(np.pi / 23 * mels[:, None] * np.arange(13)) * np.sqrt(2 / 23)
    dct_MC[:, 0] /= np.sqrt(2)
    parity(
        "MFCC's DCT (torchaudio) against its definition", 1e-5, float(np.abs(TorchaudioMfcc().dct_MC - dct_MC).max())
    )


def test_added_noise_has_the_snr_by_definition(parity: Parity) -> None:
    rng = np.random.default_rng(0)
    wave, noise = (rng.standard_normal(16_000).astype(np.float32) * 0.1 for _ in range(2))
    scale = np.sqrt(np.mean(wave.astype(np.float64) ** 2) / np.mean(noise.astype(np.float64) ** 2) * 10 ** (-7.5 / 10))
    parity(
        "noise at a ratio (torchaudio) against its definition",
        1e-5,
        np.abs(add_noise(wave, noise, 7.5) - wave - scale * noise).max(),
    )


def test_reverberation_equals_that_of_torchaudio(parity: Parity) -> None:
    functional = pytest.importorskip("torchaudio.functional")
    rng = np.random.default_rng(0)
    wave = (rng.standard_normal(16_000) * 0.1).astype(np.float32)
    response = (np.exp(-np.arange(4_000) / 500) * rng.standard_normal(4_000)).astype(np.float32)
    tail = torch.from_numpy(response[np.abs(response).argmax() :].copy())
    wet = functional.fftconvolve(torch.from_numpy(wave), tail)[:16_000]
    expected = wet * (np.mean(wave**2) / (wet**2).mean()).sqrt()
    parity("reverberation against torchaudio", 1e-5, np.abs(reverberate(wave, response) - expected.numpy()).max())


def test_random_projection_indices_equal_those_of_numpy(parity: Parity) -> None:
    """BEST-RQ's look-up in double precision: project, normalise, nearest code by Euclidean distance."""
    generator = torch.Generator().manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, 16, 8192)
    x_ND = torch.randn(10_000, 320, generator=generator)
    codebook = quantizer.codebook_KC.numpy().astype(np.float64)
    theirs = []
    for part in np.array_split(x_ND.numpy().astype(np.float64), 10):
        projected = part @ quantizer.projection_DC.numpy().astype(np.float64)
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        squares = (projected**2).sum(1)[:, None] + (codebook**2).sum(1) - 2 * projected @ codebook.T
        theirs.append(squares.argmin(1))
    other = float((quantizer(x_ND).numpy() != np.concatenate(theirs)).mean())
    parity("random-projection codes against NumPy in fp64: share of 10,000 frames that differ", 1e-4, other)


@pytest.mark.parametrize("max_distance", [800, 1280])
def test_relative_position_buckets_equal_those_of_transformers(max_distance: int, parity: Parity) -> None:
    """Uses the released sizes, for all distances within a minute."""
    wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
    theirs = wavlm.WavLMAttention(8, 2, num_buckets=320, max_distance=max_distance)
    distance = torch.arange(-3000, 3001)
    other = theirs._relative_positions_bucket(distance) != RelativeBias(2, 320, max_distance).bucket(distance)
    parity("WavLM's buckets against transformers: how many differ", 0.0, float(other.sum()))


def test_kaldi_mfcc_is_the_definition(parity: Parity) -> None:
    """Kaldi's MFCC, Δ and ΔΔ computed again in double precision: filters and spectrum by transformers, the rest NumPy.

    Povey window of 25 ms, mean removed from each frame, pre-emphasis 0.97, 23 mel bands from 20 Hz, natural logarithm,
    orthonormal DCT-II, cepstral lifter 22, regression over ±2 frames with the edge frames repeated.
    """
    audio_utils = pytest.importorskip("transformers.audio_utils")
    rng = np.random.default_rng(0)
    wave = (np.cumsum(rng.standard_normal(24_000)) * 1e-3 + 0.05 * rng.standard_normal(24_000)).astype(np.float32)
    filters = audio_utils.mel_filter_bank(
        257, 23, 20.0, 8000.0, 16_000, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    window = audio_utils.window_function(400, "povey", periodic=False)
    log_mel_MF = audio_utils.spectrogram(
        wave.astype(np.float64) * 32768.0,
        window,
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        mel_floor=float(np.finfo(np.float32).eps),
        log_mel="log",
        remove_dc_offset=True,
        dtype=np.float64,
    )
    order = np.arange(13)
    dct_CM = np.cos(np.pi / 23 * order[:, None] * (np.arange(23) + 0.5)) * np.sqrt(2 / 23)
    dct_CM[0] /= np.sqrt(2)
    cepstra_FC = (dct_CM @ log_mel_MF).T * (1 + 11 * np.sin(np.pi * order / 22))

    def slopes(x_FC: np.ndarray) -> np.ndarray:
        padded = np.pad(x_FC, ((2, 2), (0, 0)), mode="edge")
        n = len(x_FC)
        return np.asarray(sum(k * (padded[2 + k :][:n] - padded[2 - k :][:n]) for k in (1, 2)) / 10)

    first_FC = slopes(cepstra_FC)
    expected = np.concatenate([cepstra_FC, first_FC, slopes(first_FC)], axis=1)
    found = kaldi_mfcc().compute(wave)
    parity(
        "Kaldi's MFCC, Δ and ΔΔ against transformers and NumPy in fp64",
        1e-3,
        difference(torch.from_numpy(found).double(), torch.from_numpy(expected)),
    )
