"""Computes a model on streams of audio, chunk by chunk: `push(state, samples) -> (state, frames)` and `finish`.

In fp32 the frames equal those of the same model over the whole recording with the attention pattern `Pattern(chunk,
left_chunks)`, whatever the sizes of the pushes (tests/unit/pretrain/inference/test_streaming_encoder.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.inference.streaming_state import StreamState, join, take
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.streaming import Obstacle, StreamingEncoder, StreamingFrontend

MAX_MINUTES = 10.0
"""Longest stream with `left_chunks=-1`, for which state and time per chunk grow with the stream."""


class Chunking(NamedTuple):
    """chunk: frames per chunk.  left_chunks: earlier chunks that a frame attends to; -1: all."""

    chunk: int
    left_chunks: int


class StreamedModel:
    """A model that computes streams; keeps no state, so that any number of streams can share it.

    Args:
        model: front end and encoder; put into evaluation mode.
        chunk: frames per chunk, one of those trained; None: the first of them.
        left_chunks: earlier chunks attended to, one of those trained (-1: all); None: the first of them.
        max_minutes: longest stream where `left_chunks` is -1.

    Raises:
        ConfigError: the model cannot stream, or was not trained with these lengths; names the fields, the values and
            the remedy.
    """

    def __init__(
        self,
        model: SpeechModel,
        chunk: int | None = None,
        left_chunks: int | None = None,
        max_minutes: float = MAX_MINUTES,
    ) -> None:
        refused = obstacles(model)
        if refused:
            listed = "; ".join(f"{found.field}={_shown(found.value)}: {found.reason}" for found in refused)
            raise ConfigError(f"this model cannot stream: {listed}")
        assert isinstance(model.frontend, StreamingFrontend)
        assert isinstance(model.encoder, StreamingEncoder)
        self.model = model.eval()
        self.frontend, self.encoder = model.frontend, model.encoder
        self.chunking = chosen(self.encoder, chunk, left_chunks)
        self.window = self.frontend.sample_window()
        self.rate_hz = SAMPLE_RATE / self.window.hop
        self.max_frames = round(max_minutes * 60 * self.rate_hz) if self.chunking.left_chunks < 0 else None
        self.device = next(model.parameters()).device

    @property
    def delay_seconds(self) -> float:
        """Algorithmic delay: from the start of a chunk's audio to the last sample that its frames need."""
        return (self.window.samples(self.chunking.chunk) - self.window.before) / SAMPLE_RATE

    def start(self, rows: int = 1) -> StreamState:
        """Returns the state of `rows` streams before their first sample."""
        chunk, left = self.chunking
        with torch.inference_mode():
            return StreamState(
                self.frontend.start(rows),
                self.encoder.start(rows, chunk, left),
                (torch.zeros(self.window.before),) * rows,
                (0,) * rows,
                (0,) * rows,
            )

    @torch.inference_mode()
    def push(self, state: StreamState, samples: Tensor | Sequence[Tensor]) -> tuple[StreamState, EncoderOutput]:
        """Appends samples to each stream and computes the chunks that are complete.

        Args:
            state: from `start` or the previous push.
            samples: 16 kHz audio in [-1, 1] for each stream, (T_b,), of any length, 0 included; a single tensor (T,)
                for a single stream.

        Returns:
            The new state, and all layers of the new frames, each (B, F, D), of which `lengths_B` are valid (often 0);
            `output.final` is the last layer.

        Raises:
            ValueError: another number of rows than the state has, or values that are not finite.
            ConfigError: a stream is longer than `max_minutes`, and the left context is unlimited.
        """
        rows = [samples] if isinstance(samples, Tensor) else list(samples)
        if len(rows) != state.rows:
            raise ValueError(f"samples for {len(rows)} streams, but the state has {state.rows}")
        for row in rows:
            if row.ndim != 1 or not row.dtype.is_floating_point or not bool(torch.isfinite(row).all()):
                raise ValueError(
                    f"samples must be (T,) finite floating-point numbers, not {tuple(row.shape)} {row.dtype}"
                )
        state = state._replace(
            pending=tuple(torch.cat([kept, row.float().cpu()]) for kept, row in zip(state.pending, rows, strict=True)),
            samples=tuple(before + len(row) for before, row in zip(state.samples, rows, strict=True)),
        )
        needed = self.window.samples(self.chunking.chunk)
        made = _Made(state.rows)
        while ready := [row for row, kept in enumerate(state.pending) if len(kept) >= needed]:
            state = made.step(self, state, ready)
        return state, made.output(self)

    @torch.inference_mode()
    def finish(self, state: StreamState) -> tuple[StreamState, EncoderOutput]:
        """Ends all streams of the state and computes their last frames.

        Returns:
            The state after the last frame, of which only the counts are valid, and the remaining frames as from `push`.
        """
        totals = self.model.frontend.frame_lengths(torch.tensor(state.samples, dtype=torch.int64)).tolist()
        made = _Made(state.rows)
        while ready := [row for row, total in enumerate(totals) if state.frames[row] < total]:
            state = made.step(self, state, ready)
        return state, made.output(self)

    def step(self, state: StreamState) -> tuple[StreamState, EncoderOutput]:
        """Computes one chunk of every stream of the state, padded with zeros at the end of a stream."""
        chunk, left = self.chunking
        needed = self.window.samples(chunk)
        if self.max_frames is not None and max(state.frames) + chunk > self.max_frames:
            minutes = self.max_frames / self.rate_hz / 60
            raise ConfigError(
                f"left=-1: a stream is longer than max_minutes={minutes:g}, and its state grows with it; choose a "
                "limited left context, or a larger max_minutes"
            )
        waves = [kept[:needed] for kept in state.pending]
        samples_B = torch.tensor([len(wave) for wave in waves], device=self.device)
        wave_BT = torch.stack([F.pad(wave, (0, needed - len(wave))) for wave in waves]).to(self.device)
        frames, frontend = self.frontend.step(wave_BT, samples_B, state.encoder.frames_B, state.frontend)
        output, encoder = self.encoder.step(frames, state.encoder, left)
        pending = tuple(kept[chunk * self.window.hop :] for kept in state.pending)
        n_frames = [before + new for before, new in zip(state.frames, frames.lengths_B.tolist(), strict=True)]
        return StreamState(frontend, encoder, pending, state.samples, tuple(n_frames)), output


class _Made:
    """Collects the frames of the streams that advance in a push."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[tuple[Tensor, ...]]] = [[] for _ in range(rows)]

    def step(self, streamed: StreamedModel, state: StreamState, ready: Sequence[int]) -> StreamState:
        """Advances the streams that are ready by one chunk."""
        advanced, output = streamed.step(take(state, ready))
        for place, (row, length) in enumerate(zip(ready, output.lengths_B.tolist(), strict=True)):
            self.rows[row].append(tuple(layer_BFD[place, :length] for layer_BFD in output.layers))
        if len(ready) == state.rows:
            return advanced
        waiting = [row for row in range(state.rows) if row not in set(ready)]
        order = [*ready, *waiting]
        return take(join([advanced, take(state, waiting)]), [order.index(row) for row in range(state.rows)])

    def output(self, streamed: StreamedModel) -> EncoderOutput:
        """Returns all collected frames, each row padded with zeros."""
        encoder = streamed.model.encoder
        lengths = [sum(len(layers[0]) for layers in chunks) for chunks in self.rows]
        made = []
        for number in range(encoder.n_layers + 1):
            empty = torch.zeros(0, encoder.dim, device=streamed.device)
            rows = [torch.cat([empty, *(layers[number] for layers in chunks)]) for chunks in self.rows]
            made.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return EncoderOutput(tuple(made), torch.tensor(lengths, device=streamed.device), streamed.rate_hz)


def obstacles(model: SpeechModel) -> list[Obstacle]:
    """Returns the fields of a model's config that make streaming impossible, each with the reason and the remedy."""
    found: list[Obstacle] = []
    for part, kind, module in (
        ("frontend", StreamingFrontend, model.frontend),
        ("encoder", StreamingEncoder, model.encoder),
    ):
        if isinstance(module, (StreamingFrontend, StreamingEncoder)):
            found += module.obstacles()
        else:
            reason = f"has no streaming form (pretrain.interfaces.streaming.{kind.__name__})"
            found.append(Obstacle(f"{part}.name", type(module).__module__.rpartition(".")[2], reason))
    return found


def chosen(encoder: StreamingEncoder, chunk: int | None, left_chunks: int | None) -> Chunking:
    """Returns the chunk length and left context, by default the first trained ones.

    Raises:
        ConfigError: the encoder was not trained with them; lists those that it was trained with.
    """
    chunks, lefts = encoder.trained_chunks()
    for field, given, known in (("chunk", chunk, chunks), ("left", left_chunks, lefts)):
        if given is not None and given not in known:
            listed = ", ".join(map(str, known))
            raise ConfigError(f"{field}={given}: the encoder was trained with {listed}; take one of these")
    return Chunking(chunks[0] if chunk is None else chunk, lefts[0] if left_chunks is None else left_chunks)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
