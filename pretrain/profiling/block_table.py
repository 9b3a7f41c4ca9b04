"""Latency of single blocks by width on this machine: what a search for an architecture adds up."""

from __future__ import annotations

import dataclasses
import functools
import platform
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError
from pretrain import registry
from pretrain.interfaces.frames import Frames
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.stack_config import StackConfig
from pretrain.profiling.call_timing import time_in_turn
from pretrain.profiling.graph_timing import noise


class OneBlock(nn.Module):
    """One block of an encoder, from (1, F, D) frames to (1, F, D), with the positions of that many frames."""

    def __init__(self, stack: BlockStack, rate_hz: float) -> None:
        super().__init__()
        self.stack, self.rate_hz = stack, rate_hz

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Returns the block's output without the stack's own norms and positions by convolution."""
        lengths_B = torch.full((x_BFD.shape[0],), x_BFD.shape[1], dtype=torch.int64)
        return self.stack.run_blocks(x_BFD, Frames(x_BFD, lengths_B, self.rate_hz), None).layers[-1]


def block_table(
    encoder: StackConfig,
    rate_hz: float,
    heads: Sequence[int],
    ffn_dims: Sequence[int],
    seconds: float = 10.0,
    runs: int = 30,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures a block of every width, one run of each in turn.

    Args:
        encoder: fields of the encoder; its heads set the channels of a head.
        rate_hz: frames per second at the blocks.
        heads: numbers of heads.
        ffn_dims: numbers of inner channels.
        seconds: audio of one run.
        runs: runs of each block, after two that are not counted.
        threads: intra-op threads.

    Returns:
        Plain values for JSON: machine, threads, seconds, dim, noisy, and rows of heads, ffn_dim, and a CallTiming in
        milliseconds.

    Raises:
        ConfigError: a width is below 1, or the encoder has half-rate blocks, whose latency depends on their place.
    """
    if min([*heads, *ffn_dims], default=0) < 1:
        raise ConfigError(f"--heads {list(heads)} --ffn {list(ffn_dims)}: give one or more widths, each 1 or more")
    if encoder.half_rate_blocks:
        raise ConfigError(f"encoder.half_rate_blocks={encoder.half_rate_blocks}: latency depends on a block's place")
    x_BFD = torch.randn(1, max(8, round(seconds * rate_hz)), encoder.dim)
    widths = [(h, f) for h in heads for f in ffn_dims]
    sessions = []
    with tempfile.TemporaryDirectory() as folder:
        for number, width in enumerate(widths):
            file = Path(folder) / f"{number}.onnx"
            one = dataclasses.replace(encoder, layers=1, widths=(width,), layer_drop=0.0)
            _write(OneBlock(_stack(one).eval(), rate_hz), x_BFD, file)
            sessions.append(open_session(file, threads))
    given = {"x": x_BFD.numpy()}
    figures = time_in_turn([functools.partial(session.run, None, given) for session in sessions], runs)
    return {
        "machine": f"{platform.node()}, {platform.machine()}",
        "threads": threads,
        "seconds": seconds,
        "dim": encoder.dim,
        "rows": [[h, f, *figure] for (h, f), figure in zip(widths, figures, strict=True)],
        "noisy": noise({f"{h} × {f}": figure[:2] for (h, f), figure in zip(widths, figures, strict=True)}),
    }


def _stack(config: StackConfig) -> BlockStack:
    built = registry.build_encoder(config)
    assert isinstance(built, BlockStack)
    return built


def _write(block: OneBlock, x_BFD: Tensor, file: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(block, (x_BFD,), strict=False)
        made: Any = torch.onnx.export(program, (), input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
    file.write_bytes(made.model_proto.SerializeToString())
