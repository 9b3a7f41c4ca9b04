"""Distance of two waveforms by their spectra at several resolutions (Parallel WaveGAN, arXiv 1910.11480, § 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.nn.spectral import LogMel

SIZES = (256, 512, 1024)
"""FFT sizes; the hop is a quarter."""
FLOOR = 1e-3
"""Added to magnitudes: about the noise of 16-bit rounding in a window of 512 samples."""


class SpectralLoss(nn.Module):
    """Sums over resolutions: mean |Δ ln magnitude| and spectral convergence; plus mean |Δ ln mel|. No weights.

    Args:
        mel: definition of the mel frames.
    """

    def __init__(self, mel: LogMel) -> None:
        super().__init__()
        self.mel = mel

    @property
    def least_samples(self) -> int:
        """The shortest audio that it can compare."""
        return max(SIZES)

    def forward(self, found_BT: Tensor, wanted_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns the distance of each row, (B,) fp32; windows that reach beyond a row's length do not count.

        Args:
            found_BT, wanted_BT: (B, T) samples at 16 kHz, T at least `least_samples`.
            lengths_B: valid samples of each row, int64; rows without a whole window at some size have no part there.
        """
        total_B = found_BT.new_zeros(len(found_BT))
        for size in SIZES:
            hann = torch.hann_window(size, device=found_BT.device)
            found_BFK, wanted_BFK = (
                torch.stft(wave_BT.float(), size, size // 4, window=hann, center=False, return_complex=True)
                .transpose(1, 2)
                for wave_BT in (found_BT, wanted_BT)
            )  # fmt: skip
            found_BFK, wanted_BFK = _magnitude(found_BFK), _magnitude(wanted_BFK)
            whole_BF1 = _whole(found_BFK, lengths_B, size, size // 4)
            logs_BFK = (found_BFK + FLOOR).log() - (wanted_BFK + FLOOR).log()
            total_B = total_B + _mean(logs_BFK.abs(), whole_BF1)
            power_B = _mean(wanted_BFK.square(), whole_BF1)
            error_B = _mean((found_BFK - wanted_BFK).square(), whole_BF1)
            total_B = total_B + ((error_B + 1e-8) / (power_B + 1e-4)).sqrt()
        difference_BFD = (self.mel.log_power(found_BT) - self.mel.log_power(wanted_BT)).abs()
        return total_B + _mean(difference_BFD, _whole(difference_BFD, lengths_B, self.mel.window, self.mel.hop))


def _magnitude(spectrum_BFK: Tensor) -> Tensor:
    return (spectrum_BFK.real.square() + spectrum_BFK.imag.square() + 1e-9).sqrt()


def _whole(x_BFK: Tensor, lengths_B: Tensor, window: int, hop: int) -> Tensor:
    """Returns which windows lie within each row's length, (B, F, 1) bool."""
    ends_F = torch.arange(x_BFK.shape[1], device=lengths_B.device) * hop + window
    return (ends_F <= lengths_B[:, None])[:, :, None]


def _mean(x_BFK: Tensor, whole_BF1: Tensor) -> Tensor:
    """Returns the mean over the whole windows of each row, (B,); 0 without any."""
    count_B = whole_BF1.sum((1, 2)).clamp(min=1) * x_BFK.shape[2]
    return x_BFK.masked_fill(~whole_BF1, 0.0).sum((1, 2)) / count_B
