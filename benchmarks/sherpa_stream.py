"""A stream of ours in sherpa-onnx's runtime (pip install sherpa-onnx): its T-one models have one tensor of states.

That runtime cuts the audio of such models into 300 ms at 8 kHz and decodes CTC greedily. The graph repeats each
sample, so that its model gets 16 kHz. States are fp16, and the count of frames stops at MOST_FRAMES: for timing alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.heads.ctc import CTC
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.interop.stream_export import StreamStep, flat

RATE, CHUNK_MS = 8_000, 300
MOST_FRAMES = 1_020
"""fp16 counts exactly up to 2,048."""


class SherpaGraph(nn.Module):
    """A step of the stream with samples and states as sherpa-onnx passes them.

    Args:
        streamed: a model with chunks of 300 ms.
        head: its CTC head.
    """

    def __init__(self, streamed: StreamedModel, head: CTC) -> None:
        super().__init__()
        self.step, self.chunk = StreamStep(streamed, head), streamed.chunking.chunk
        self.advance = streamed.window.hop * self.chunk
        self.kept = streamed.window.samples(self.chunk) - self.advance
        states = flat(streamed.start())
        self.shapes, self.sizes = [state.shape[1:] for state in states], [state[0].numel() for state in states]

    @property
    def state_dim(self) -> int:
        """Numbers of a stream's state: samples, frames so far, and the model's states."""
        return self.kept + 1 + sum(self.sizes)

    def forward(self, signal_1T1: Tensor, state_1S: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ln p, (1, F, V), and the next state of 300 ms of int32 samples."""
        wave_1T = (signal_1T1[:, :, 0].float() / 32_767).repeat_interleave(2, dim=1)
        past_1T, frames_1, states_1S = state_1S.float().split([self.kept, 1, sum(self.sizes)], dim=1)
        window_1T = torch.cat([past_1T, wave_1T], dim=1)
        parts = states_1S.split(self.sizes, dim=1)
        states = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
        samples_1 = torch.full((1,), window_1T.shape[1])
        _, log_probs_1FV, _, *after = self.step(window_1T, samples_1, frames_1[:, 0].long(), states)
        count_11 = (frames_1 + self.chunk).clamp(max=MOST_FRAMES)
        rows = [window_1T[:, self.advance :], count_11, *(state.flatten(1) for state in after)]
        return log_probs_1FV, torch.cat(rows, dim=1).half()


def write_graph(streamed: StreamedModel, head: CTC, folder: Path) -> None:
    """Writes model.onnx and tokens.txt."""
    graph = SherpaGraph(streamed, head)
    example = torch.ones(1, RATE * CHUNK_MS // 1_000, 1, dtype=torch.int32), torch.zeros(1, graph.state_dim).half()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, example, strict=False)
        names: dict[str, Any] = {"input_names": ["signal", "state"], "output_names": ["logprobs", "state_next"]}
        made: Any = torch.onnx.export(program, (), **names, dynamo=True, verbose=False)
    proto = made.model_proto
    about = {"frame_length_ms": CHUNK_MS, "state_dim": graph.state_dim, "sample_rate": RATE}
    for name, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, str(value)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    written = ["<blk>", *("_" if symbol == " " else symbol for symbol in head.symbols)]
    tokens = "".join(f"{symbol} {number}\n" for number, symbol in enumerate(written))
    (folder / "tokens.txt").write_text(tokens, encoding="utf-8")


class SherpaStream:
    """Pushes of one stream through sherpa-onnx's recogniser, which includes greedy decoding."""

    def __init__(self, folder: Path) -> None:
        import sherpa_onnx

        files = {"tokens": str(folder / "tokens.txt"), "model": str(folder / "model.onnx")}
        self.recogniser = sherpa_onnx.OnlineRecognizer.from_t_one_ctc(**files, num_threads=1)
        self.stream = self.recogniser.create_stream()

    def push(self, wave_T: np.ndarray) -> None:
        """Takes (T,) samples at 8 kHz, computes what is complete and reads the text."""
        self.stream.accept_waveform(RATE, wave_T)
        while self.recogniser.is_ready(self.stream):
            self.recogniser.decode_stream(self.stream)
        self.recogniser.get_result(self.stream)
