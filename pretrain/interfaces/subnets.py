"""Subnets of a weight-sharing supernet: fewer blocks, heads and inner channels, always the first ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError, about, config
from pretrain.interfaces.frames import BlockGates

Subnet = tuple[tuple[int, int], ...]
"""Heads and inner channels of each block that runs, as `encoder.widths` holds them."""


@config
class ElasticConfig:
    """Sizes that the subnets of a supernet may have; all empty: no supernet."""

    blocks: Annotated[
        tuple[int, ...], about("numbers of blocks, counted from the first; empty: all blocks in every subnet")
    ] = ()
    heads: Annotated[tuple[int, ...], about("numbers of heads of a block; empty: all heads")] = ()
    ffn: Annotated[tuple[int, ...], about("numbers of inner channels of a block; empty: all channels")] = ()
    warmup_steps: Annotated[
        int, about("updates of the largest subnet alone, before smaller ones take part (LightHuBERT)", ge=0)
    ] = 0

    @property
    def given(self) -> bool:
        """Whether the run trains a supernet."""
        return bool(self.blocks or self.heads or self.ffn)


class Space:
    """All subnets of a supernet. Heads and channels of each block are chosen independently.

    Args:
        elastic: the sizes.
        layers, heads, ffn_dim: sizes of the supernet, each the largest of its list.
        parts: feed-forward parts per block, which have the same number of channels.

    Raises:
        ConfigError: a size is below 1, listed twice or above the supernet's, or the supernet's is not listed.
    """

    def __init__(self, elastic: ElasticConfig, layers: int, heads: int, ffn_dim: int, parts: int) -> None:
        self.blocks = _sizes("blocks", elastic.blocks, layers, "encoder.layers")
        self.heads = _sizes("heads", elastic.heads, heads, "encoder.heads")
        self.ffn = _sizes("ffn", elastic.ffn, ffn_dim, "encoder.ffn_dim")
        self.layers, self.parts = layers, parts

    @property
    def size(self) -> int:
        """Number of different subnets."""
        return sum((len(self.heads) * len(self.ffn)) ** blocks for blocks in self.blocks)

    @property
    def largest(self) -> Subnet:
        """The supernet itself."""
        return self.uniform(self.blocks[-1], self.heads[-1], self.ffn[-1])

    @property
    def smallest(self) -> Subnet:
        """The subnet with the fewest weights."""
        return self.uniform(self.blocks[0], self.heads[0], self.ffn[0])

    def uniform(self, blocks: int, heads: int, ffn: int) -> Subnet:
        """Returns the subnet whose blocks are all alike."""
        return ((heads, ffn),) * blocks

    def uniforms(self) -> Iterator[Subnet]:
        """Yields every subnet whose blocks are all alike (uniform scaling)."""
        for blocks, heads, ffn in itertools.product(self.blocks, self.heads, self.ffn):
            yield self.uniform(blocks, heads, ffn)

    def draw(self, rng: np.random.Generator) -> Subnet:
        """Draws the number of blocks, then heads and channels of each block, each of their sizes equally likely."""
        blocks = int(rng.choice(self.blocks))
        return tuple((int(rng.choice(self.heads)), int(rng.choice(self.ffn))) for _ in range(blocks))

    def holds(self, subnet: Subnet) -> bool:
        """Returns whether all sizes of a subnet are among those of this space."""
        return len(subnet) in self.blocks and all(h in self.heads and f in self.ffn for h, f in subnet)

    def gates(self, subnet: Subnet, device: torch.device) -> tuple[BlockGates, ...]:
        """Returns 1 for the first heads and channels of each block that runs, and 0 for others."""
        heads_H, channels_C = (torch.arange(size[-1], device=device) for size in (self.heads, self.ffn))
        return tuple(
            BlockGates((heads_H < heads).float(), ((channels_C < ffn).float(),) * self.parts) for heads, ffn in subnet
        )


def _sizes(field: str, given: tuple[int, ...], whole: int, of: str) -> tuple[int, ...]:
    """Returns the sizes in order, or the supernet's alone where none is given."""
    wrong = [size for size in given if not 1 <= size <= whole]
    if wrong or (given and (len(set(given)) < len(given) or max(given) != whole)):
        limit = f"must be different sizes from 1 to {of}={whole}, the size of the supernet, which is one of them"
        raise ConfigError(f"objective.elastic.{field}={list(given)}: {limit}")
    return tuple(sorted(given)) or (whole,)
