"""Multi-head self-attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.positions import rotate


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value come from one matrix product."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention: {dim} channels do not divide into {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BFD: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """mask: what broadcasts to (B, heads, F, F), bool (True attends) or a bias; None lets a fast kernel run."""
        q, k, v = self.qkv(x_BFD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        dropout = self.dropout if self.training else 0.0
        y_BHFC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out(y_BHFC.transpose(1, 2).flatten(2))
        return out


def padding_mask(valid_BF: Tensor) -> Tensor | None:
    """What keeps attention off padding, (B, 1, 1, F) bool; None where nothing is padded."""
    return None if bool(torch.all(valid_BF)) else valid_BF[:, None, None, :]
