"""The definition of mel frames, which checkpoints keep as a checksum."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from pretrain.nn.spectral import LogMel


class MelConvention:
    """Compares the mel frames of a module with those that its checkpoint was trained with, once.

    Args:
        mel: definition of the frames.
    """

    def __init__(self, mel: LogMel) -> None:
        self.text = _described(mel)
        self._sha256 = hashlib.sha256(self.text.encode()).digest()
        self._compared = False

    def checksum(self) -> Tensor:
        """Returns what a checkpoint keeps, (32,) uint8."""
        return torch.tensor(list(self._sha256), dtype=torch.uint8)

    def require(self, kept: Tensor, n_mels: int) -> None:
        """Compares with what a checkpoint kept.

        Args:
            kept: (32,) uint8.
            n_mels: bands, for the message.

        Raises:
            ConfigError: they differ.
        """
        if not self._compared and bytes(kept.tolist()) != self._sha256:
            raise ConfigError(
                f"n_mels={n_mels}: this version defines mel frames as {self.text}, and the checkpoint was trained with "
                "others; use the version that trained it, or train again"
            )
        self._compared = True


def _described(mel: LogMel) -> str:
    return (
        f"{mel.dim} bands on HTK's scale, power, ln(x + {mel.FLOOR:g}), Hann window of {mel.window} and hop of "
        f"{mel.hop} samples at 16 kHz without padding, FFT of {mel.n_fft}, (x - {mel.MEAN:g}) / {mel.STD:g}"
    )
