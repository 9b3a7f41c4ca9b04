"""Feed-forward transformer blocks of FastSpeech (arXiv 1905.09263, § 3.1) over tokens or frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.decoders.transformer import Attention
from pretrain.nn.convolution import TimeConv
from pretrain.nn.dropout import Dropout
from pretrain.nn.positions import sinusoids


def masked(x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """Returns `x_BND` with zeros where `valid_BN` is False."""
    return x_BND.masked_fill(~valid_BN[:, :, None], 0.0)


class Block(nn.Module):
    """Self-attention, then two convolutions with a ReLU between them, each after a layer norm and added to its input.

    Args:
        dim: channels.
        heads: attention heads.
        ffn_dim: channels between the convolutions.
        kernel: width of the first convolution, odd; the second has width 1.
        dropout: of both residual sums.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, 0.0)
        self.ffn_in = TimeConv(dim, ffn_dim, kernel, padding=kernel // 2)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.drop = Dropout(dropout)

    def forward(self, x_BND: Tensor, valid_BN: Tensor) -> Tensor:
        """Returns (B, N, dim), zero where `valid_BN` is False."""
        normed = self.attention_norm(x_BND)
        first_N = torch.arange(valid_BN.shape[1], device=valid_BN.device) == 0
        visible_B11N = (valid_BN | first_N)[:, None, None]  # a row without a valid position sees its first one
        x_BND = x_BND + self.drop(self.attention.attend(normed, *self.attention.keys(normed), visible_B11N))
        inner = F.relu(self.ffn_in(masked(self.ffn_norm(x_BND), valid_BN)))
        return masked(x_BND + self.drop(self.ffn_out(inner)), valid_BN)


class FeedForwardTransformer(nn.Module):
    """Blocks after position vectors (sines and cosines), with a last layer norm. (B, N, dim) to (B, N, dim).

    Args:
        blocks: number of blocks.
        dim: channels of a frame.
        heads: of the attention.
        ffn_dim: inner channels of the convolutions.
        kernel: their frames.
        dropout: after each part of a block.
    """

    def __init__(self, blocks: int, dim: int, heads: int, ffn_dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, ffn_dim, kernel, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.drop = Dropout(dropout)

    def forward(self, x_BND: Tensor, valid_BN: Tensor) -> Tensor:
        places_N = torch.arange(x_BND.shape[1], device=x_BND.device)
        x_BND = masked(self.drop(x_BND + sinusoids(places_N, x_BND.shape[2]).to(x_BND.dtype)), valid_BN)
        for block in self.blocks:
            x_BND = block(x_BND, valid_BN)
        return masked(self.norm(x_BND), valid_BN)
