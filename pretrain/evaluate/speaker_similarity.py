"""Similarity of two voices by the speaker encoder that the package Resemblyzer carries.

The encoder is GE2E (Wan et al. 2018, arXiv 1710.10467): three LSTM layers over 40 mel bands of windows of 1.6 s, whose
last states are averaged and normalised; trained by Resemblyzer's authors on LibriSpeech, VoxCeleb 1 and 2. Its file of
weights is read here, and the package is not imported: it needs webrtcvad, of 2017, which does not start beside current
setuptools, to leave out silence. Silence stays in here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE

PACKAGE: Final = "resemblyzer"
DIM: Final = 256
WINDOW, STEP, LEAST_COVERED = 160, 77, 0.75
"""Mel frames (10 ms) of a window and from one to the next, and how much of the last window must be audio."""
TARGET_DB: Final = -30.0
"""Quieter audio is amplified to this mean power, in dB of full scale."""
Embed = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


class VoiceEncoder(nn.Module):
    """Embeddings (W, 256) of length 1 of windows of mel frames, (W, 160, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, DIM, 3, batch_first=True)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, mel_WFM: Tensor) -> Tensor:
        _, (hidden_LWD, _) = self.lstm(mel_WFM)
        return F.normalize(F.relu(self.linear(hidden_LWD[-1])), dim=1)


def speaker_encoder() -> Embed:
    """Returns what turns (T,) samples at 16 kHz into an embedding of the voice, (256,), of length 1.

    Raises:
        ConfigError: the package is not installed, or its file of weights cannot be read.
    """
    try:
        found = importlib.util.find_spec(PACKAGE)
    except ValueError:
        found = None
    weights = next(
        (Path(folder) / "pretrained.pt" for folder in (found and found.submodule_search_locations) or ()), None
    )
    if weights is None or not weights.is_file():
        raise ConfigError(
            "the similarity of voices needs the speaker encoder of the package Resemblyzer: pip install --no-deps "
            "resemblyzer==0.1.4 (16 MB, of which the weights alone are read)"
        )
    encoder = VoiceEncoder().eval()
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    except Exception as error:  # what torch raises for a damaged file has no common base
        reason = type(error).__name__  # its text recommends to execute what the file holds
        raise ConfigError(f"{weights}: cannot be read ({reason}); install resemblyzer==0.1.4 again") from None
    mel = MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=40, pad_mode="constant", norm="slaney", mel_scale="slaney"
    )

    @torch.inference_mode()
    def embed(wave_T: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        wave = torch.from_numpy(amplified(wave_T))
        starts = window_starts(len(wave))
        wave = F.pad(wave, (0, max(0, (starts[-1] + WINDOW) * 160 - len(wave))))
        mel_FM = mel(wave).T
        mean_D = encoder(torch.stack([mel_FM[start : start + WINDOW] for start in starts])).mean(0)
        made: npt.NDArray[np.float32] = F.normalize(mean_D, dim=0).numpy()
        return made

    return embed


def amplified(wave_T: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns audio whose mean power is at least `TARGET_DB`; silence stays as it is."""
    power = float(np.square(wave_T, dtype=np.float64).mean()) if len(wave_T) else 0.0
    gain = np.sqrt(10 ** (TARGET_DB / 10) / power) if power else 1.0
    return (wave_T * max(gain, 1.0)).astype(np.float32)


def window_starts(samples: int) -> list[int]:
    """Returns the first mel frame of each window of so many samples, one window at least."""
    frames = -(-(samples + 1) // 160)
    starts = list(range(0, max(1, frames - WINDOW + STEP + 1), STEP))
    covered = (samples - starts[-1] * 160) / (WINDOW * 160)
    return starts[:-1] if covered < LEAST_COVERED and len(starts) > 1 else starts
