"""Fields of the configs of encoders of equal blocks: sizes, dropout, attention patterns."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator

from data_pipeline.core.integers import divisors
from data_pipeline.core.schema import about, config, one_or_several, refuse
from pretrain.interfaces.configs import EncoderConfig


class Width(NamedTuple):
    """The size of one block: heads of `head_dim` channels each, and inner channels of its feed-forward parts."""

    heads: int
    ffn_dim: int
    head_dim: int


@config
class StackConfig(EncoderConfig):
    """Fields of all encoders based on BlockStack."""

    heads: Annotated[int, about("attention heads; must divide dim", ge=1)] = 12
    ffn_dim: Annotated[int, about("inner channels of a feed-forward part", ge=1)] = 3072
    widths: Annotated[
        tuple[tuple[int, int], ...],
        about(
            "heads and inner channels of each block, [[heads, ffn_dim], …], where blocks differ; a head keeps dim / "
            "heads channels; empty: heads and ffn_dim in all blocks"
        ),
    ] = ()
    dropout: Annotated[float, about("dropout of each residual branch and of the input", ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, about("dropout of attention weights", ge=0, lt=1)] = 0.1
    activation_dropout: Annotated[float, about("dropout inside the feed-forward part", ge=0, lt=1)] = 0.0
    layer_drop: Annotated[float, about("probability to skip a block, the same on all ranks in a step", ge=0, lt=1)] = (
        0.05
    )
    stochastic_depth: Annotated[
        float,
        about(
            "probability to leave out a residual branch of the last block for one utterance; less before", ge=0, lt=1
        ),
    ] = 0.0
    half_rate_blocks: Annotated[
        int, about("number of blocks in the middle at half the frame rate (U-shape); 0: none", ge=0)
    ] = 0
    attention: Annotated[
        Literal["full", "local_global", "chunked"],
        about(
            "frames attended to: all; neighbours, with every n-th block full; a frame's own chunk and those before it"
        ),
    ] = "full"
    window: Annotated[int, about("local_global: frames that a local block attends to, half on each side", ge=2)] = 64
    full_every: Annotated[int, about("local_global: every n-th block attends to all frames", ge=1)] = 3
    registers: Annotated[int, about("local_global: learned frames that all attend to and that attend to all", ge=0)] = 0
    chunk_frames: Annotated[
        tuple[int, ...],
        about("chunked: chunk lengths, drawn for each update in training; the first is used otherwise; 0 is no limit"),
    ] = (0, 8, 16, 32)
    left_chunks: Annotated[
        tuple[int, ...],
        BeforeValidator(one_or_several),
        about("chunked: chunks attended to before the own one, drawn likewise; -1: all"),
    ] = (-1,)
    attention_kernel: Annotated[
        Literal["auto", "blocks", "flex"],
        about(
            "auto: FlexAttention for patterns and packed rows on a GPU without attention dropout, else blocks; flex on "
            "a CPU is for tests, without gradients"
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            near = sorted(sorted(divisors(self.dim), key=lambda heads: abs(heads - self.heads))[:2])
            refuse("heads", self.heads, f"must divide encoder.dim={self.dim}; take {' or '.join(map(str, near))}")
        if self.widths and len(self.widths) != self.layers:
            given = [list(pair) for pair in self.widths]
            refuse("widths", given, f"has {len(given)} pairs, and encoder.layers={self.layers} blocks need one each")
        if any(least < 1 for pair in self.widths for least in pair):
            refuse("widths", [list(pair) for pair in self.widths], "each block needs 1 head and 1 channel or more")
        if self.half_rate_blocks and self.half_rate_blocks > self.layers - 2:
            refuse(
                "half_rate_blocks",
                self.half_rate_blocks,
                f"must leave a block on each side of encoder.layers={self.layers}",
            )
        if self.attention == "chunked":
            odd = [chunk for chunk in self.chunk_frames if chunk < 0 or (self.half_rate_blocks and chunk % 2)]
            if odd or not self.chunk_frames:
                limit = (
                    "even numbers, as encoder.half_rate_blocks joins pairs" if self.half_rate_blocks else "0 or more"
                )
                refuse("chunk_frames", list(self.chunk_frames), f"must be one or more lengths, {limit}")
            if not self.left_chunks or min(self.left_chunks) < -1:
                refuse("left_chunks", list(self.left_chunks), "must be one or more numbers of chunks, -1 for all")

    @property
    def block_widths(self) -> tuple[Width, ...]:
        """The width of each block."""
        given = self.widths or ((self.heads, self.ffn_dim),) * self.layers
        return tuple(Width(heads, ffn_dim, self.dim // self.heads) for heads, ffn_dim in given)

    @property
    def heads_may_differ(self) -> bool:
        """Whether blocks may have different numbers of heads."""
        return True

    @property
    def without_last_blocks(self) -> dict[str, object]:
        """Fields that change, besides `layers` and `widths`, where the last blocks are cut off."""
        return {}

    def refuse_odd_heads(self) -> None:
        """Refuses heads with an odd number of channels: rotary positions rotate pairs of channels."""
        if self.dim // self.heads % 2:
            refuse("heads", self.heads, f"leaves {self.dim // self.heads} channels per head; rope needs an even number")
