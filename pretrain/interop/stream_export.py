"""Exports a run as an ONNX graph of one chunk of a stream, whose states are inputs and outputs.

`run.py` beside it, which needs onnxruntime and numpy alone, runs it; `stream.json` describes its inputs. Nothing is
written unless the graph, loaded from its file, reproduces the streams of the model.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.inference.streaming_state import StreamState
from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.streaming import BlockMemory, EncoderState
from pretrain.interop import stream_program
from pretrain.interop.export_tolerance import require_close
from pretrain.interop.graph_export import architecture_label, first_line, require

GRAPH, DESCRIPTION, PROGRAM = "stream.onnx", "stream.json", "run.py"
CHECKED_STREAMS = 3
CHECKED_CHUNKS = 6


class StreamStep(nn.Module):
    """The exported module: one chunk of B streams, with all states as separate tensors.

    Args:
        streamed: the model with its chunk and left context.
        head: a CTC head, whose ln p are the second output; None: the last layer alone.
    """

    def __init__(self, streamed: StreamedModel, head: CTC | None) -> None:
        super().__init__()
        self.model, self.head = streamed.model, head
        self.streamed = streamed

    def forward(self, wave_BT: Tensor, samples_B: Tensor, frames_B: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Computes one chunk.

        Args:
            wave_BT: (B, T) window of samples; see `StreamingFrontend.step`.
            samples_B: samples of each row up to the stream's end, int64.
            frames_B: frames that each stream had before, int64.
            states: as `flat` returns them.

        Returns:
            The last layer (B, F, D), ln p (B, F, V) if there is a head, valid frames (B,), and the new states.
        """
        frontend, encoder, streamed = self.streamed.frontend, self.streamed.encoder, self.streamed
        n_front = len(frontend.start(1))
        frames: Frames
        frames, front = frontend.step(wave_BT, samples_B, frames_B, tuple(states[:n_front]))
        memories = [BlockMemory(*states[at : at + 3]) for at in range(n_front, len(states), 3)]
        output: EncoderOutput
        output, state = encoder.step(frames, EncoderState(tuple(memories), frames_B), streamed.chunking.left_chunks)
        made = [output.layers[-1]]
        if self.head is not None:
            made.append(self.head.log_probs(output))
        new = [*front, *(tensor for memory in state.blocks for tensor in memory)]
        return (*made, output.lengths_B, *new)


def flat(state: StreamState) -> list[Tensor]:
    """Returns the tensors of a state in the order of the graph's inputs."""
    return [*state.frontend, *(tensor for memory in state.encoder.blocks for tensor in memory)]


def state_names(state: StreamState) -> list[str]:
    """Returns the names of these tensors."""
    names = [f"frontend_{number}" for number in range(len(state.frontend))]
    for number in range(len(state.encoder.blocks)):
        names += [f"{part}_{number}" for part in ("keys", "values", "tail")]
    return names


def export_stream(
    config: Config,
    model: SpeechModel,
    folder: Path,
    chunk: int | None = None,
    left_chunks: int | None = None,
    head: CTC | None = None,
) -> float:
    """Writes the graph, its description and a program that runs it.

    Args:
        config: the config that `model` was trained with.
        model: front end and encoder; not modified.
        folder: must not exist; is created complete or not at all.
        chunk: frames per chunk, among those trained; None: the first.
        left_chunks: left context in chunks, among those trained; None: the first limited one.
        head: a CTC head whose ln p the graph also returns.

    Returns:
        The largest difference from the model's own stream, relative to the largest feature.

    Raises:
        ConfigError: the model cannot stream, or not with a limited left context; a package is missing; `folder` exists;
            or the graph differs by more than the tolerance of ONNX graphs.
    """
    require("onnx", "onnxscript", "onnxruntime")
    model, head = copy.deepcopy(model).cpu().float().eval(), copy.deepcopy(head)
    streamed = StreamedModel(model, chunk, left_chunks)
    if left_chunks is None and streamed.chunking.left_chunks < 0:
        limited = [left for left in streamed.encoder.trained_chunks()[1] if left >= 0]
        streamed = StreamedModel(model, chunk, limited[0]) if limited else streamed
    if streamed.chunking.left_chunks < 0:
        raise ConfigError("left=-1: a graph's states have a fixed size; choose a limited left context that was trained")
    step = StreamStep(streamed, None if head is None else head.cpu().float().eval())
    with new_folder(folder) as made:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warnings; `largest_difference` compares the results
                _write_graph(step, made / GRAPH)
        except (ConfigError, OSError):
            raise
        except Exception as error:  # the exporter raises any type for what it cannot trace
            raise ConfigError(
                f"{architecture_label(config)} cannot be exported as onnx_stream: {first_line(error)}. The run's "
                "checkpoint is unchanged"
            ) from None
        description = described(config, step)
        difference = largest_difference(step, made / GRAPH)
        require_close(difference, "onnx_stream", architecture_label(config))
        (made / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        shutil.copy(stream_program.__file__, made / PROGRAM)
    return difference


def described(config: Config, step: StreamStep) -> dict[str, Any]:
    """Returns the content of stream.json, the description of the graph for clients."""
    streamed, state = step.streamed, step.streamed.start()
    shapes = dict(zip(state_names(state), (list(tensor.shape[1:]) for tensor in flat(state)), strict=True))
    return {
        "format": "onnx_stream",
        "sample_rate": SAMPLE_RATE,
        "window_samples": streamed.window.samples(streamed.chunking.chunk),
        "advance_samples": streamed.window.hop * streamed.chunking.chunk,
        "zeros_before": streamed.window.before,
        "chunk_frames": streamed.chunking.chunk,
        "left_chunks": streamed.chunking.left_chunks,
        "frames_per_second": streamed.rate_hz,
        "delay_seconds": streamed.delay_seconds,
        "inputs": {"wave": "float32 (B, window_samples)", "samples": "int64 (B,)", "frames": "int64 (B,)"},
        "outputs": [*_outputs(step), "lengths"],
        "states": shapes,
        "symbols": list(step.head.symbols) if step.head is not None else [],
        "run": config.name,
        "architecture": {part: getattr(config, part).name for part in ("frontend", "encoder", "objective")},
    }


def _outputs(step: StreamStep) -> list[str]:
    return ["features"] if step.head is None else ["features", "log_probs"]


def _write_graph(step: StreamStep, file: Path) -> None:
    streamed, rows = step.streamed, 2
    state = streamed.start(rows)
    names = state_names(state)
    needed = streamed.window.samples(streamed.chunking.chunk)
    # values that occur in a stream, so that no branch of the export depends on an empty one
    example = (
        0.1 * torch.randn(rows, needed),
        torch.full((rows,), needed),
        torch.full((rows,), streamed.chunking.chunk),
        [tensor.clone() for tensor in flat(state)],
    )
    batch = torch.export.Dim("batch")
    dynamic = {
        "wave_BT": {0: batch},
        "samples_B": {0: batch},
        "frames_B": {0: batch},
        "states": [{0: batch}] * len(names),
    }
    program = torch.export.export(
        step, example, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    made: Any = torch.onnx.export(
        program,
        (),
        input_names=["wave", "samples", "frames", *names],
        output_names=[*_outputs(step), "lengths", *(f"next_{name}" for name in names)],
        dynamo=True,
        verbose=False,
    )
    write_synced(file, made.model_proto.SerializeToString())


@torch.no_grad()
def largest_difference(step: StreamStep, file: Path) -> float:
    """Runs streams of different length through the graph and through the model.

    Returns:
        The largest difference of frames and states, relative to the largest feature; inf for other lengths.
    """
    session = open_session(file)
    used = {given.name for given in session.get_inputs()}
    generator, worst = torch.Generator().manual_seed(0), 0.0
    streamed, rows = step.streamed, CHECKED_STREAMS
    needed = streamed.window.samples(streamed.chunking.chunk)
    state = streamed.start(rows)
    frames_B, states, names = state.encoder.frames_B, flat(state), ["wave", "samples", "frames", *state_names(state)]
    for number in range(CHECKED_CHUNKS):
        wave_BT = 0.1 * torch.randn(rows, needed, generator=generator)
        samples_B = torch.full((rows,), needed)
        if number + 1 == CHECKED_CHUNKS:  # the last chunk of each stream ends elsewhere
            samples_B = needed - streamed.window.hop * torch.arange(rows)
            wave_BT = wave_BT.masked_fill(torch.arange(needed) >= samples_B[:, None], 0.0)
        if number == 2:  # one stream begins later
            frames_B = frames_B.clone()
            frames_B[0] = 0
            states = [torch.cat([fresh[:1], tensor[1:]]) for fresh, tensor in zip(flat(state), states, strict=True)]
        expected = step(wave_BT, samples_B, frames_B, states)
        everything = zip(names, [wave_BT, samples_B, frames_B, *states], strict=True)
        given = {name: tensor.numpy() for name, tensor in everything if name in used}
        found = [torch.from_numpy(array) for array in session.run(None, given)]
        lengths_B = expected[len(_outputs(step))]
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
            return float("inf")
        if not torch.equal(found[len(_outputs(step))], lengths_B):
            return float("inf")
        valid_BF = torch.arange(expected[0].shape[1]) < lengths_B[:, None]
        worst = max(worst, _relative(found[0][valid_BF], expected[0][valid_BF]))
        frames_B, states = frames_B + lengths_B, list(expected[len(_outputs(step)) + 1 :])
    return worst


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
