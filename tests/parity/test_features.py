"""Features and code look-ups against torchaudio and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.nn.quantizers import RandomProjectionQuantizer
from pretrain.nn.spectral import LogMel, mel_filters


def test_mel_filters_are_torchaudios() -> None:
    functional = pytest.importorskip("torchaudio.functional")
    for n_fft, n_mels in ((512, 80), (512, 40), (1024, 64)):
        theirs = functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 8000.0, n_mels, 16_000)
        torch.testing.assert_close(mel_filters(n_fft, n_mels), theirs, rtol=0, atol=1e-5)


def test_log_mel_is_torchaudios() -> None:
    transforms = pytest.importorskip("torchaudio.transforms")
    wave_BT = torch.randn(2, 16_000)
    spectrum = transforms.MelSpectrogram(16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80, center=False)
    ours = LogMel(normalize="fixed")
    # torchaudio centres its window in the FFT: its frame f covers ours shifted by (512 - 400) / 2 samples
    mine = ours(wave_BT[:, 56:], torch.tensor([16_000 - 56] * 2)).x_BFD * ours.STD + ours.MEAN
    theirs = torch.log(spectrum(wave_BT).transpose(1, 2) + ours.FLOOR)
    torch.testing.assert_close(mine[:, : theirs.shape[1]], theirs, rtol=1e-4, atol=1e-4)


def test_random_projection_indices_are_numpys() -> None:
    """Recipe: ≥ 99.99 % alike, given the same projection and codebook."""
    quantizer = RandomProjectionQuantizer(320)
    x_ND = torch.randn(20_000, 320)
    projected = x_ND.numpy().astype(np.float64) @ quantizer.projection_DC.numpy().astype(np.float64)
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    codebook = quantizer.codebook_KC.numpy().astype(np.float64)
    theirs = np.concatenate(
        [
            np.argmin(np.linalg.norm(part[:, None] - codebook[None], axis=2), axis=1)
            for part in np.array_split(projected[:1000], 20)
        ]
    )
    assert (quantizer(x_ND)[:1000].numpy() == theirs).mean() >= 0.9999
