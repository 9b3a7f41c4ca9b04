"""What an exported graph computes instead of `unfold` and the FFT, for any window and hop."""

from __future__ import annotations

import pytest
import torch

from pretrain.nn.spectral import power_spectrum, windows

WAVE = 0.1 * torch.randn(3, 4_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("window", "hop"), [(400, 160), (1_024, 160), (64, 16), (401, 73), (160, 160), (100, 250)])
@pytest.mark.parametrize("samples", [1_024, 2_001, 4_000])
def test_windows_of_a_graph_are_those_of_unfold(
    window: int, hop: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = windows(WAVE[:, :samples], window, hop)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(windows(WAVE[:, :samples], window, hop), expected)


@pytest.mark.parametrize(("window", "n_fft"), [(400, 512), (401, 512), (512, 512), (1_024, 1_024), (63, 64)])
def test_the_spectrum_of_a_graph_is_that_of_the_fft(window: int, n_fft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy in double precision, as a share of the largest power; the FFT in single precision has 1e-7."""
    frames_BFW = WAVE.unfold(1, window, 160)
    exact = torch.from_numpy(abs(torch.fft.rfft(frames_BFW.double(), n=n_fft).numpy()) ** 2)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = power_spectrum(frames_BFW, n_fft)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max() / exact.max()) < 1e-6
