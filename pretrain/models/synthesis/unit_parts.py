"""Parts of the head `units`: the tower of what is read, and the predictor of durations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext, valid_frames
from pretrain.models.synthesis.variance import VariancePredictor
from pretrain.nn.positions import sinusoids


class Tower(nn.Module):
    """Encoder of a sequence of ids. Its last input is the mark that hides a token.

    Args:
        encoder: of frames with `dim` channels.
        dim: channels of an id's vector.
        vocabulary: number of different ids.
    """

    def __init__(self, encoder: nn.Module, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocabulary + 1, dim)
        self.encoder = encoder
        self.out = nn.Linear(dim, vocabulary)

    def forward(self, ids_BN: Tensor, lengths_B: Tensor, ctx: StepContext | None) -> tuple[Frames, Tensor]:
        """Returns a vector for each id, and logits of the id at each place, (B, N, vocabulary).

        Args:
            ids_BN: int64, padded with any id.
            lengths_B: ids of each row, on the host.
            ctx: seed and step of training; None: outside of it.
        """
        x_BND: Tensor = self.vectors(ids_BN)
        places_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
        x_BND = x_BND + sinusoids(places_N, x_BND.shape[2], interleaved=True).to(x_BND.dtype)
        inside_BN = valid_frames(lengths_B, ids_BN.shape[1], ids_BN.device)
        frames = Frames(x_BND.masked_fill(~inside_BN[:, :, None], 0.0), lengths_B, 1.0)
        encoded: EncoderOutput = self.encoder(frames, ctx)
        return encoded.final, self.out(encoded.final.x_BFD)


class Durations(nn.Module):
    """Predicts ln(1 + frames) of each unit from its neighbours, (B, N)."""

    def __init__(self, units: int, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(units, dim)
        self.predict = VariancePredictor(dim, dim, 3, 0.1)

    def forward(self, ids_BN: Tensor) -> Tensor:
        """Returns (B, N) fp32, 0 where the id is negative."""
        out_BN: Tensor = self.predict(self.vectors(ids_BN.clamp(min=0)), ids_BN >= 0)
        return out_BN
