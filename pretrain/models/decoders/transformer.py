"""Transformer decoder: pre-norm blocks of causal self-attention, cross-attention over memories, and feed-forward.

Whisper's decoder (arXiv 2212.04356) and that of torch (`norm_first`), with one difference: cross-attention sees several
memories joined in time, each frame with a learned vector of its memory's kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from pretrain.interfaces.models import Decoder, DecoderState, Memory
from pretrain.nn.dropout import Dropout
from pretrain.nn.positions import sinusoids


@config
class DecoderConfig:
    """Sizes of the decoder; the defaults are those of a BASE model."""

    dim: Annotated[int, about("channels; 0 takes the encoder's", ge=0)] = 0
    layers: Annotated[int, about("blocks", ge=1)] = 6
    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 8
    ffn_dim: Annotated[int, about("inner channels of the feed-forward part", ge=1)] = 2048
    activation: Annotated[Literal["gelu", "relu"], about("of the feed-forward part")] = "gelu"
    positions: Annotated[
        Literal["learned", "sinusoidal"], about("position vectors: learned (Whisper), or sines and cosines")
    ] = "learned"
    max_tokens: Annotated[int, about("longest text with its end mark; longer ones do not count", ge=2, le=65_536)] = 448
    dropout: Annotated[float, about("dropout of embeddings and residual sums", ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, about("dropout of attention weights", ge=0, lt=1)] = 0.0
    output_bias: Annotated[
        bool, about("whether the output layer has a bias; transformers' decoders have none, see `auricle export`")
    ] = True


class Attention(nn.Module):
    """Multi-head attention with keys and values that were computed before."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys(self, x_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, each (B, H, M, C)."""
        key, value = self.key_value(x_BMD).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def attend(
        self, x_BND: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Returns the attention output (B, N, D) of queries from `x_BND`.

        Args:
            x_BND: normalised frames that the queries are computed from.
            key, value: (B, H, M, C), as `keys` returns them.
            mask: True where a key is visible; None: everywhere.
            causal: whether a position sees no later one.
        """
        query = self.query(x_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        y_BHNC = F.scaled_dot_product_attention(query, key, value, mask, p, is_causal=causal)
        out: Tensor = self.out(y_BHNC.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and added to its input."""

    def __init__(self, config: DecoderConfig, dim: int) -> None:
        super().__init__()
        self.attention_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = Attention(dim, config.heads, config.attention_dropout)
        self.cross = Attention(dim, config.heads, config.attention_dropout)
        self.ffn_in, self.ffn_out = nn.Linear(dim, config.ffn_dim), nn.Linear(config.ffn_dim, dim)
        self.relu = config.activation == "relu"
        self.drop = Dropout(config.dropout)

    def forward(
        self, x_BND: Tensor, memory_BMD: Tensor, visible_BM: Tensor | None, valid_BN: Tensor | None = None
    ) -> Tensor:
        """Returns (B, N, D) for all positions of a text at once.

        A position sees those before it, or, given `valid_BN`, all valid ones.
        """
        normed = self.attention_norm(x_BND)
        seen_B11N = None if valid_BN is None else valid_BN[:, None, None]
        keys = self.attention.keys(normed)
        x_BND = x_BND + self.drop(self.attention.attend(normed, *keys, seen_B11N, causal=valid_BN is None))
        return self._rest(x_BND, self.cross.keys(memory_BMD), visible_BM)

    def step(
        self,
        x_B1D: Tensor,
        past: tuple[Tensor, Tensor] | None,
        memory: tuple[Tensor, Tensor],
        visible_BM: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the output for the next position, (B, 1, D), and keys and values of all positions so far.

        Args:
            x_B1D: the next position.
            past: keys and values of the positions before, (B, H, N, C); None at the start.
            memory: keys and values of the memories, (B, H, M, C).
            visible_BM: frames of the memories that may be attended to; None: all.
        """
        normed = self.attention_norm(x_B1D)
        key, value = self.attention.keys(normed)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        x_B1D = x_B1D + self.attention.attend(normed, key, value)
        return self._rest(x_B1D, memory, visible_BM), (key, value)

    def _rest(self, x_BND: Tensor, memory: tuple[Tensor, Tensor], visible_BM: Tensor | None) -> Tensor:
        mask = None if visible_BM is None else visible_BM[:, None, None]
        normed = self.cross_norm(x_BND)
        if len(memory[0]) == 1 < len(normed):  # one memory for all rows: they are its queries, in one product
            attended = self.cross.attend(normed.flatten(0, 1)[None], *memory, mask).view_as(normed)
        else:
            attended = self.cross.attend(normed, *memory, mask)
        x_BND = x_BND + self.drop(attended)
        inner = self.ffn_in(self.ffn_norm(x_BND))
        out: Tensor = x_BND + self.drop(self.ffn_out(F.relu(inner) if self.relu else F.gelu(inner)))
        return out


class TransformerDecoder(Decoder):
    """Predicts each token of a text from those before it and from memories.

    Args:
        config: sizes.
        dim: channels of memories and of the decoder.
        tokens: number of different tokens that it reads, special ones included.
        classes: number of tokens that it can predict, the first ones.
        memories: kinds of memories.
    """

    def __init__(self, config: DecoderConfig, *, dim: int, tokens: int, classes: int, memories: int = 1) -> None:
        super().__init__()
        if dim % config.heads:
            raise ValueError(f"decoder.heads={config.heads}: must divide the decoder's {dim} channels")
        self.max_tokens = config.max_tokens
        self.embedding = nn.Embedding(tokens, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.positions = nn.Embedding(config.max_tokens, dim) if config.positions == "learned" else None
        self.kinds = nn.Embedding(memories, dim) if memories > 1 else None
        for table in (self.positions, self.kinds):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config, dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, classes, bias=config.output_bias)
        self.drop = Dropout(config.dropout)

    def forward(self, tokens_BN: Tensor, memories: Sequence[Memory]) -> Tensor:
        return self._decode(self._embed(tokens_BN, 0), memories)

    def _decode(self, x_BND: Tensor, memories: Sequence[Memory], seen_BN: Tensor | None = None) -> Tensor:
        """Returns logits (B, N, V) of embedded positions, which see those before them, or all of `seen_BN`."""
        memory_BMD, visible_BM = self._join(memories)
        x_BND = self.drop(x_BND)
        for block in self.blocks:
            x_BND = block(x_BND, memory_BMD, visible_BM, seen_BN)
        logits_BNV: Tensor = self.out(self.norm(x_BND))
        return logits_BNV

    def start(self, memories: Sequence[Memory]) -> DecoderState:
        memory_BMD, visible_BM = self._join(memories)
        return DecoderState(0, (), tuple(block.cross.keys(memory_BMD) for block in self._blocks()), visible_BM)

    def step(self, state: DecoderState, tokens_B: Tensor) -> tuple[Tensor, DecoderState]:
        x_B1D, kept = self._embed(tokens_B[:, None], state.place), []
        for number, (block, memory) in enumerate(zip(self._blocks(), state.memory, strict=True)):
            past = state.past[number] if state.past else None
            x_B1D, keys = block.step(x_B1D, past, memory, state.visible_BM)
            kept.append(keys)
        logits_BV: Tensor = self.out(self.norm(x_B1D))[:, 0]
        return logits_BV, state._replace(place=state.place + 1, past=tuple(kept))

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _embed(self, tokens_BN: Tensor, first: int) -> Tensor:
        x_BND: Tensor = self.embedding(tokens_BN)
        places_N = torch.arange(first, first + tokens_BN.shape[1], device=tokens_BN.device)
        if self.positions is not None:
            added: Tensor = self.positions(places_N)
        else:
            added = sinusoids(places_N, x_BND.shape[-1]).to(x_BND.dtype)
        return x_BND + added

    def _join(self, memories: Sequence[Memory]) -> tuple[Tensor, Tensor | None]:
        """Joins memories in time; rows of which no frame is valid see the first one, which is zero."""
        parts, visible = [], []
        for number, memory in enumerate(memories):
            x_BMD, valid_BM = memory.x_BMD, memory.valid_BM()
            if self.kinds is not None:
                x_BMD = x_BMD + self.kinds(torch.tensor(number, device=x_BMD.device))
            parts.append(x_BMD.masked_fill(~valid_BM[:, :, None], 0.0))
            visible.append(valid_BM)
        visible_BM = torch.cat(visible, dim=1)
        nothing_B1 = ~visible_BM.any(dim=1, keepdim=True)
        first_M = torch.arange(visible_BM.shape[1], device=visible_BM.device) == 0
        return torch.cat(parts, dim=1), visible_BM | (nothing_B1 & first_M)


class OnePassDecoder(TransformerDecoder):
    """Predicts all places of a sequence at once from those of other sequences and from memories.

    The further code levels of VALL-E (arXiv 2301.02111, § 4.2.2) are predicted this way. Positions are
    sines and cosines.
    """

    def forward(self, tokens_BNL: Tensor, memories: Sequence[Memory]) -> Tensor:
        """Returns logits (B, N, V).

        Args:
            tokens_BNL: ids of L sequences, whose vectors are added; negative beyond each row's end.
            memories: as of `TransformerDecoder`.
        """
        valid_BN = tokens_BNL[:, :, 0] >= 0
        x_BNLD: Tensor = self.embedding(tokens_BNL.clamp(min=0))
        places_N = torch.arange(tokens_BNL.shape[1], device=tokens_BNL.device)
        x_BND = x_BNLD.sum(2) + sinusoids(places_N, x_BNLD.shape[-1]).to(x_BNLD.dtype)
        seen_BN = valid_BN | (places_N == 0)  # a row without a valid position sees its first one
        return self._decode(x_BND, memories, seen_BN)
