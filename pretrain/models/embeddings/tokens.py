"""Embedding of the tokens of a text, with learned or sinusoidal positions."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import EmbeddingConfig
from pretrain.interfaces.frames import Frames, valid_frames
from pretrain.interfaces.models import Embedding
from pretrain.nn.numerics import row_numbers
from pretrain.nn.positions import sinusoids


@config
class Config(EmbeddingConfig):
    name: Literal["tokens"] = "tokens"
    tokens: Annotated[str, about("name in data.tokens of the tokens to read", min_length=1)] = "text"
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=1)]
    max_tokens: Annotated[int, about("longest text; a longer one counts as absent", ge=1, le=65_536)] = 256
    positions: Annotated[
        Literal["learned", "sinusoidal", "none"], about("position vectors added to those of the tokens")
    ] = "learned"

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token set of the text."""
        return {self.tokens: self.vocabulary}


class Tokens(Embedding):
    """Vectors of tokens; one frame per token."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.vectors = nn.Embedding(config.vocabulary, dim)
        self.positions = nn.Embedding(config.max_tokens, dim) if config.positions == "learned" else None

    def present(self, batch: Batch) -> Tensor:
        length_B = (batch.token_rows(self.config.tokens) >= 0).sum(1)
        return (length_B > 0) & (length_B <= self.config.max_tokens)

    def given(self, batch: Batch) -> Tensor:
        return (batch.token_rows(self.config.tokens) >= 0).any(1)

    def identity(self, batch: Batch) -> Tensor:
        return row_numbers(batch.token_rows(self.config.tokens) + 1) * self.present(batch)

    def forward(self, batch: Batch) -> Frames:
        ids_BN = batch.token_rows(self.config.tokens)[:, : self.config.max_tokens]
        if not ids_BN.shape[1]:
            ids_BN = F.pad(ids_BN, (0, 1), value=-1)
        lengths_B, device = (ids_BN >= 0).sum(1) * self.present(batch), self.vectors.weight.device
        x_BND: Tensor = self.vectors(ids_BN.clamp(min=0).to(device, non_blocking=True))
        places_N = torch.arange(ids_BN.shape[1], device=device)
        if self.positions is not None:
            x_BND = x_BND + self.positions(places_N)
        elif self.config.positions == "sinusoidal":
            x_BND = x_BND + sinusoids(places_N, self.dim, interleaved=True).to(x_BND.dtype)
        inside_BN = valid_frames(lengths_B, ids_BN.shape[1], device)
        return Frames(x_BND.masked_fill(~inside_BN[:, :, None], 0.0), lengths_B, 1.0)


def build(config: Config, dim: int) -> Tokens:
    return Tokens(config, dim)
