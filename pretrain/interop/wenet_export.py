"""Exports a streaming CTC recogniser in WeNet's layout, which sherpa-onnx runs on phones and boards.

A graph computes one chunk from Kaldi's filterbank features. Its states are two tensors, of keys and values, and of
what convolutions need from the chunk before: those of the blocks, then, in further columns, those of the front end.
Nothing is written unless the graph, loaded from its file, reproduces the recogniser over a whole recording.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.streaming import BlockMemory, EncoderState
from pretrain.interop.export_tolerance import require_close
from pretrain.interop.graph_export import architecture_label, first_line, require
from pretrain.models.frontends.log_mel import Config as LogMelConfig
from pretrain.models.frontends.log_mel import LogMelFrontend
from pretrain.nn.kaldi_mel import EARLIER, KaldiMel
from pretrain.nn.stack_config import StackConfig

GRAPH, TOKENS, DESCRIPTION = "model.onnx", "tokens.txt", "wenet.json"
DROPPED = 1
"""First features of a stream that the graph does not use: sherpa-onnx mirrors their audio at the stream's start."""
SKIPPED_SAMPLES = 160 * DROPPED - EARLIER
"""Samples at the start of a recording that the recogniser does not hear."""
CHECKED_SECONDS = 3.1


class StateLayout(NamedTuple):
    """Sizes of WeNet's states.  tail: frames that the blocks' convolutions need.  spare: columns of the front end."""

    blocks: int
    heads: int
    dim: int
    tail: int
    spare: int


class WenetStep(nn.Module):
    """The exported module: one chunk of one stream.

    Args:
        streamed: the model with its chunk and left context.
        head: its CTC head.
    """

    def __init__(self, streamed: StreamedModel, head: CTC) -> None:
        super().__init__()
        frontend = streamed.model.frontend
        assert isinstance(frontend, LogMelFrontend)
        self.model, self.head, self.streamed, self.frontend = streamed.model, head, streamed, frontend
        memories = streamed.start().encoder.blocks
        self.front_sizes = [tensor.shape[1:] for tensor in frontend.start(1)]
        dim, columns = streamed.encoder.dim, len(memories) * streamed.encoder.dim
        spare = -(-sum(size.numel() for size in self.front_sizes) // columns)
        tail = memories[0].tail_BKD.shape[1]
        self.layout = StateLayout(len(memories), memories[0].keys_BHLC.shape[1], dim, tail, spare)

    @property
    def features(self) -> int:
        """Features of a chunk, as sherpa-onnx passes them."""
        return self.streamed.chunking.chunk * self.frontend.subsampling + DROPPED

    def states(self) -> tuple[Tensor, Tensor]:
        """Returns the states before the first chunk: (N, H, L, 2C) and (N, 1, D, K)."""
        chunk, left = self.streamed.chunking
        layout = self.layout
        attention = torch.zeros(layout.blocks, layout.heads, chunk * left, 2 * layout.dim // layout.heads)
        return attention, torch.zeros(layout.blocks, 1, layout.dim, layout.tail + layout.spare)

    def forward(
        self, chunk_1TM: Tensor, offset_1: Tensor, kept_1: Tensor, attention_NHLC: Tensor, convolution_N1DK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes one chunk.

        Args:
            chunk_1TM: `features` features of Kaldi's filterbank, of 16-bit samples.
            offset_1: frames that the stream had before, plus `kept_1`; int64.
            kept_1: frames of the left context, int64.
            attention_NHLC: keys and values of the left context, side by side.
            convolution_N1DK: what convolutions need of earlier frames.

        Returns:
            ln p, (1, F, V), and the new states.
        """
        tail, mel = self.layout.tail, self.frontend.mel
        features_1TM = (chunk_1TM[:, DROPPED:] - mel.MEAN) / mel.STD
        flat = convolution_N1DK[:, :, :, tail:].flatten()
        front, at = [], 0
        for size in self.front_sizes:
            front.append(flat[at : at + size.numel()].view(1, *size))
            at += size.numel()
        lengths_1 = torch.full((1,), self.streamed.chunking.chunk, dtype=torch.int64)
        frames, new_front = self.frontend.step_features(features_1TM, lengths_1, tuple(front))
        keys_NHLC, values_NHLC = attention_NHLC.chunk(2, dim=3)
        tails_NKD = convolution_N1DK[:, 0, :, :tail].transpose(1, 2)
        memories = [
            BlockMemory(keys, values, last)
            for keys, values, last in zip(
                *(torch.split(x, 1) for x in (keys_NHLC, values_NHLC, tails_NKD)), strict=True
            )
        ]
        state = EncoderState(tuple(memories), offset_1 - kept_1)
        output, state = self.streamed.encoder.step(frames, state, self.streamed.chunking.left_chunks)
        attention = torch.cat([torch.cat([m.keys_BHLC, m.values_BHLC], dim=3) for m in state.blocks])
        made = torch.cat([tensor.flatten() for tensor in new_front] or [flat[:0]])
        spare = F.pad(made, (0, flat.shape[0] - made.shape[0])).view(self.layout.blocks, 1, self.layout.dim, -1)
        tails = torch.cat([m.tail_BKD for m in state.blocks]).transpose(1, 2)[:, None]
        return self.head.log_probs(output), attention, torch.cat([tails, spare], dim=3)


def export_wenet(
    config: Config, model: SpeechModel, folder: Path, chunk: int | None, left_chunks: int | None, head: CTC | None
) -> float:
    """Writes the graph with WeNet's metadata, tokens.txt, and a description with what to pass to sherpa-onnx.

    Args:
        config: the config that `model` was trained with.
        model: front end and encoder; not modified.
        folder: must not exist; is created complete or not at all.
        chunk: frames per chunk, among those trained; None: the first.
        left_chunks: left context in chunks, among those trained; None: the first limited one.
        head: the CTC head.

    Returns:
        The largest difference of ln p from the recogniser's stream, relative to the largest value.

    Raises:
        ConfigError: the model is no CTC recogniser, cannot stream, or does not fit WeNet's layout, with the fields to
            set; a package is missing; `folder` exists; or the graph differs by more than the tolerance.
    """
    require("onnx", "onnxscript", "onnxruntime")
    if head is None:
        raise ConfigError("--to wenet: needs a CTC head; train one with add_head@heads.text=ctc, or auricle finetune")
    _require_layout(config)
    model, head = copy.deepcopy(model).cpu().float().eval(), copy.deepcopy(head).cpu().float().eval()
    streamed = StreamedModel(model, chunk, left_chunks)
    limited = [left for left in streamed.encoder.trained_chunks()[1] if left > 0]
    if left_chunks is None and streamed.chunking.left_chunks <= 0 and limited:
        streamed = StreamedModel(model, chunk, limited[0])
    if streamed.chunking.left_chunks <= 0:
        raise ConfigError(f"left={streamed.chunking.left_chunks}: WeNet's states hold 1 chunk or more, not all")
    step = WenetStep(streamed, head)
    with new_folder(folder) as made:
        try:
            _write_graph(step, made / GRAPH)
        except (ConfigError, OSError):
            raise
        except Exception as error:  # the exporter raises any type for what it cannot trace
            raise ConfigError(
                f"{architecture_label(config)} cannot be exported as wenet: {first_line(error)}"
            ) from None
        difference = gate(step, made / GRAPH)
        require_close(difference, "wenet", architecture_label(config))
        symbols = ["<blk>", *("▁" if symbol == " " else symbol for symbol in head.symbols)]
        tokens = "".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols))
        (made / TOKENS).write_text(tokens, encoding="utf-8")
        (made / DESCRIPTION).write_text(json.dumps(_described(config, step), indent=2) + "\n", encoding="utf-8")
    return difference


def _require_layout(config: Config) -> None:
    """Raises ConfigError for a model whose features or states WeNet's layout cannot hold."""
    front, encoder = config.frontend, config.encoder
    if not isinstance(front, LogMelConfig) or front.mel != "kaldi" or (front.window, front.hop) != (400, 160):
        raise ConfigError(
            f"frontend.name={front.name}: sherpa-onnx computes Kaldi's filterbank, windows of 25 ms every 10 ms; train "
            "with frontend=log_mel frontend.mel=kaldi frontend.normalize=fixed"
        )
    if isinstance(encoder, StackConfig):
        if encoder.half_rate_blocks:
            raise ConfigError(f"encoder.half_rate_blocks={encoder.half_rate_blocks}: WeNet has one frame rate; set 0")
        if any(width.heads != encoder.heads for width in encoder.block_widths):
            raise ConfigError("encoder.widths: WeNet's states have the same number of heads in all blocks")


def _described(config: Config, step: WenetStep) -> dict[str, Any]:
    chunk, left = step.streamed.chunking
    return {
        "format": "wenet",
        "run": config.name,
        "sample_rate": SAMPLE_RATE,
        "sherpa_onnx": {
            "from_wenet_ctc": {"chunk_size": chunk, "num_left_chunks": left, "feature_dim": step.frontend.feature_dim}
        },
        "skipped_samples": SKIPPED_SAMPLES,
        "frames_per_second": step.streamed.rate_hz,
    }


def _metadata(step: WenetStep) -> dict[str, int]:
    layout = step.layout
    return {
        "head": layout.heads,
        "num_blocks": layout.blocks,
        "output_size": layout.dim,
        "cnn_module_kernel": layout.tail + layout.spare + 1,
        "right_context": step.frontend.subsampling - 1 + DROPPED,
        "subsampling_factor": step.frontend.subsampling,
        "vocab_size": len(step.head.symbols) + 1,
    }


INPUTS = ("chunk", "offset", "required_cache_size", "att_cache", "cnn_cache", "att_mask")


def _write_graph(step: WenetStep, file: Path) -> None:
    import onnx

    chunk, left = step.streamed.chunking
    kept = torch.tensor([chunk * left])
    example = (torch.randn(1, step.features, step.frontend.feature_dim) + 15, kept + chunk, kept, *step.states())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(step, example, strict=False)
        made: Any = torch.onnx.export(
            program,
            (),
            input_names=list(INPUTS[:-1]),
            output_names=["log_probs", "next_att_cache", "next_cnn_cache"],
            dynamo=True,
            verbose=False,
        )
    proto = made.model_proto
    # sherpa-onnx passes six inputs in order; the mask says what offset and required_cache_size say as well
    given = {value.name: value for value in proto.graph.input}
    mask = onnx.helper.make_tensor_value_info(INPUTS[-1], onnx.TensorProto.BOOL, [1, 1, chunk * (left + 1)])
    scalar = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]) for name in INPUTS[1:3]}
    ordered = [given.get(name, scalar.get(name, mask)) for name in INPUTS]
    del proto.graph.input[:]
    proto.graph.input.extend(ordered)
    for name, value in _metadata(step).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, str(value)
    write_synced(file, proto.SerializeToString())


@torch.no_grad()
def gate(step: WenetStep, file: Path) -> float:
    """Computes a recording by the graph, in sherpa-onnx's way, and by the model's stream.

    Returns:
        The largest difference of ln p, relative to the largest value.
    """
    generator = torch.Generator().manual_seed(0)
    wave_T = 0.1 * torch.randn(round(CHECKED_SECONDS * SAMPLE_RATE), generator=generator)
    found_FV = run_graph(step, file, wave_T)
    _, first = step.streamed.push(step.streamed.start(), wave_T[SKIPPED_SAMPLES:])
    expected_FV = step.head.log_probs(first)[0, : len(found_FV)]
    if len(expected_FV) < len(found_FV) or not len(found_FV):
        return float("inf")
    return float((found_FV - expected_FV).abs().max() / expected_FV.abs().max())


def run_graph(step: WenetStep, file: Path, wave_T: Tensor) -> Tensor:
    """Computes the whole chunks of a recording as sherpa-onnx's loop does; returns ln p, (F, V)."""
    session, (attention, convolution) = open_session(file, 1), step.states()
    chunk, left = step.streamed.chunking
    mel = step.frontend.mel
    assert isinstance(mel, KaldiMel)
    padded_1T = F.pad(wave_T[None], (EARLIER, 0))  # sherpa-onnx mirrors instead; these frames are dropped
    features_FM = mel.log_power(padded_1T)[0]
    kept, shift, found = chunk * left, chunk * step.frontend.subsampling, []
    values: list[Any] = [attention.numpy(), convolution.numpy()]
    for number, at in enumerate(range(0, len(features_FM) - step.features + 1, shift)):
        given = {
            "chunk": features_FM[None, at : at + step.features].numpy(),
            "offset": torch.tensor([kept + number * chunk]).numpy(),
            "required_cache_size": torch.tensor([kept]).numpy(),
            "att_cache": values[0],
            "cnn_cache": values[1],
            "att_mask": torch.ones(1, 1, kept + chunk, dtype=torch.bool).numpy(),
        }
        log_probs, *values = session.run(None, given)
        found.append(torch.from_numpy(log_probs[0]))
    return torch.cat(found)
