"""Kaldi's log-mel filterbank features, as devices compute them (kaldi-native-fbank, sherpa-onnx, WeNet)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks

from data_pipeline.core.types import SAMPLE_RATE
from pretrain.nn.spectral import LogMel, Normalize, power_spectrum, windows

EARLIER = 120
"""Samples by which sherpa-onnx's frames begin earlier: half of what a window of 25 ms is longer than 10 ms."""


class KaldiMel(LogMel):
    """As LogMel, with Kaldi's definition: 16-bit scale, no offset, pre-emphasis, Povey's window, 20 to 7,600 Hz.

    Equal to torchaudio's `compliance.kaldi.fbank` without dither, and with `snip_edges=True`: frame f covers samples
    hop·f … hop·f + window. sherpa-onnx's frame f begins `EARLIER` samples before that, and mirrors the first ones.
    """

    FLOOR = torch.finfo(torch.float32).eps
    MEAN, STD = 15.0, 4.0
    SCALE, PREEMPHASIS = 32_768.0, 0.97
    LOW_HZ, HIGH_HZ = 20.0, -400.0
    """Edges of the filters; a negative one is counted from half the sampling rate."""

    def __init__(self, n_mels: int = 80, window: int = 400, hop: int = 160, normalize: Normalize = "utterance") -> None:
        super().__init__(n_mels, window, hop, normalize)
        self.hann = torch.hann_window(window, periodic=False).pow(0.85)
        banks_MK, _ = get_mel_banks(n_mels, self.n_fft, SAMPLE_RATE, self.LOW_HZ, self.HIGH_HZ, 100.0, -500.0, 1.0)
        self.filters = torch.nn.functional.pad(banks_MK, (0, 1)).T.contiguous()

    def log_power(self, wave_BT: Tensor) -> Tensor:
        frames_BFW = windows(self.SCALE * wave_BT.float(), self.window, self.hop)
        frames_BFW = frames_BFW - frames_BFW.mean(dim=2, keepdim=True)
        before_BFW = torch.cat([frames_BFW[:, :, :1], frames_BFW[:, :, :-1]], dim=2)
        power_BFK = power_spectrum((frames_BFW - self.PREEMPHASIS * before_BFW) * self.hann, self.n_fft)
        mel_BFD: Tensor = (power_BFK @ self.filters).clamp(min=self.FLOOR).log()
        return mel_BFD
