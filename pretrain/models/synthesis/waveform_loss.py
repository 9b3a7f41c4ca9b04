"""What a vocoder learns from: a part of each row's recording, made from recorded or predicted mel frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import Frames
from pretrain.models.synthesis.spectral_loss import SpectralLoss
from pretrain.models.synthesis.vocoder import ISTFTVocoder
from pretrain.nn.numerics import full_precision

LEAST_FRAMES = 8
"""Fewest frames over which the vocoder is compared: the longest window of the spectral distance."""


def waveform_loss(
    vocoder: ISTFTVocoder,
    distance: SpectralLoss,
    wave_BT: Tensor,
    mel: Frames,
    source_BFD: Tensor,
    first_B: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Returns the distance of the vocoder's audio from the recording, (B,), and the audio (B, T).

    Args:
        vocoder: makes audio of mel frames.
        distance: of two waveforms.
        wave_BT: recordings at 16 kHz.
        mel: their mel frames, with lengths on the device.
        source_BFD: what the vocoder reads, frames as those of `mel`.
        first_B: first frame of each row's part, int64.
        width: frames of a part, `LEAST_FRAMES` or more.
    """
    hop, window, device = distance.mel.hop, distance.mel.window, wave_BT.device
    frames_B = (mel.lengths_B - first_B).clamp(max=width)
    made_BT = vocoder(_cut(source_BFD, first_B, width), frames_B)
    samples = hop * (width - 1) + window
    wanted_BT = _cut(wave_BT[:, :, None], first_B * hop, samples)[:, :, 0]
    # samples with all of their vocoder windows within the part
    valid_B = ((frames_B - 1) * hop + window).clamp(min=0) * (frames_B > 0)
    wanted_BT = wanted_BT * (torch.arange(samples, device=device) < valid_B[:, None])
    with full_precision(device):
        distance_B: Tensor = distance(made_BT, wanted_BT, valid_B)
    return distance_B, made_BT


def own_speech(batch: Batch) -> Tensor:
    """Returns what each segment's text says, (B, T): without the utterances that were mixed into it, where known."""
    if batch.sources_BST is None:
        return batch.wave_BT
    known_B = batch.sources_BST.any(2).any(1)  # all parts are silent where no partner was found
    return torch.where(known_B[:, None], batch.sources_BST[:, 0], batch.wave_BT)


def _cut(x_BFD: Tensor, first_B: Tensor, width: int) -> Tensor:
    """Returns `width` positions of each row from `first_B` on, (B, width, D), zero beyond the end."""
    padded_BFD = F.pad(x_BFD, (0, 0, 0, width))
    index_BF = first_B[:, None] + torch.arange(width, device=first_B.device)
    return padded_BFD.gather(1, index_BF[:, :, None].expand(-1, -1, x_BFD.shape[2]))
