"""A stream equals the same model over the whole recording, for any push sizes and any company in a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.inference.streaming_state import StreamState, join, split, take
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.attention_patterns import Pattern
from pretrain.nn.block_stack import BlockStack
from pretrain.train_module import build_speech_model
from tests.support.contract_cases import small, speech_like

TOLERANCE = 1e-5
FRONTENDS: dict[str, dict[str, Any]] = {
    "waveform_conv": {"name": "waveform_conv", "channels": 16, "norm": "layer"},
    "waveform_conv, bias, other strides": {
        "name": "waveform_conv", "channels": 16, "norm": "layer", "bias": True,
        "kernels": [12, 5, 3], "strides": [8, 4, 5],
    },
    "log_mel": {"name": "log_mel", "n_mels": 20, "normalize": "fixed"},
    "log_mel, 8 windows per frame": {"name": "log_mel", "n_mels": 20, "normalize": "fixed", "subsampling": 8},
    "log_mel, no convolution": {"name": "log_mel", "n_mels": 20, "normalize": "fixed", "subsampling": 1},
    "multiscale": {"name": "multiscale", "n_mels": 20, "wave_channels": 8, "normalize": "fixed"},
}  # fmt: skip
CHUNKED = {"attention": "chunked", "chunk_frames": [0, 4, 6], "left_chunks": [2, 0, -1]}
ENCODERS: dict[str, dict[str, Any]] = {
    "transformer": small("encoders", "transformer", positions="rope", norm="pre", **CHUNKED),
    "post-norm, no positions": small("encoders", "transformer", positions="none", norm="post", **CHUNKED),
    "half rate": small(
        "encoders", "transformer", positions="rope", norm="pre", layers=3, half_rate_blocks=1, **CHUNKED
    ),
    "causal convolution": small("encoders", "conformer", causal=True, kernel=5, widths=[[1, 48], [2, 16]], **CHUNKED),
    "chunk-wise convolution": small("encoders", "conformer", chunk_convolution=True, kernel=9, **CHUNKED),
    "convolution longer than a chunk": small("encoders", "conformer", causal=True, kernel=15, **CHUNKED),
}
PAIRS = [("log_mel", encoder) for encoder in ENCODERS] + [(frontend, "transformer") for frontend in FRONTENDS]
PAIRS += [("multiscale", "chunk-wise convolution"), ("waveform_conv", "half rate")]


@functools.cache
def built(frontend: str, encoder: str) -> SpeechModel:
    values = {
        "data": {"shards": "none"},
        "objective": small("objectives", "best_rq"),
        "frontend": FRONTENDS[frontend],
        "encoder": ENCODERS[encoder],
    }
    torch.manual_seed(5)
    return build_speech_model(load(Config, values)).eval()


@torch.inference_mode()
def whole(model: SpeechModel, wave_T: Tensor, chunk: int, left: int) -> list[Tensor]:
    """Returns all layers of the model over the whole recording, (F, D) each."""
    assert isinstance(model.encoder, BlockStack)
    model.encoder.stream = Pattern(chunk=chunk, left_chunks=left)
    try:
        output = model(wave_T[None], torch.tensor([len(wave_T)]))
    finally:
        model.encoder.stream = None
    return [layer[0, : int(output.lengths_B[0])] for layer in output.layers]


def streamed(model: StreamedModel, wave_T: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Returns all layers of the recording pushed in parts of these sizes, the last of them repeatedly."""
    state, parts, at, turn = model.start(), [], 0, 0
    while at < len(wave_T):
        size = sizes[min(turn, len(sizes) - 1)]
        state, output = model.push(state, wave_T[at : at + size])
        parts.append([layer[0] for layer in output.layers])
        at, turn = at + size, turn + 1
    state, output = model.finish(state)
    parts.append([layer[0] for layer in output.layers])
    return [torch.cat(layers) for layers in zip(*parts, strict=True)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [len(layer) for layer in found] == [len(layer) for layer in expected]
    worst = max(float((mine - other).abs().max()) for mine, other in zip(found, expected, strict=True))
    assert worst <= TOLERANCE


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    chunk=st.sampled_from([4, 6]),
    left=st.sampled_from([2, 0, -1]),
    seconds=st.floats(0.2, 1.6),
    sizes=st.lists(st.integers(1, 9_000), min_size=1, max_size=6).map(lambda sizes: [*sizes, max(200, sizes[-1])]),
)
def test_a_stream_equals_the_whole_recording(
    pair: tuple[str, str], chunk: int, left: int, seconds: float, sizes: list[int]
) -> None:
    model, wave_T = built(*pair), speech_like(seconds, 3)
    expected = whole(model, wave_T, chunk, left)
    assert_equal(streamed(StreamedModel(model, chunk, left), wave_T, sizes), expected)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_front_end_and_encoder_streams(pair: tuple[str, str]) -> None:
    model, wave_T = built(*pair), speech_like(2.13, 4)
    expected = whole(model, wave_T, 4, 2)
    assert len(expected[0]) > 20
    assert_equal(streamed(StreamedModel(model, 4, 2), wave_T, [777]), expected)
    assert float((expected[-1] - whole(model, wave_T, 4, 0)[-1]).abs().max()) > 1e-3  # the left context matters


@pytest.mark.parametrize("left", [2, -1])
def test_streams_of_a_batch_do_not_depend_on_each_other(left: int) -> None:
    """Streams start, advance and end at different times; each equals itself alone."""
    model = built("multiscale", "causal convolution")
    stream = StreamedModel(model, 4, left)
    waves = [speech_like(seconds, row) for row, seconds in enumerate((1.9, 0.7, 1.3))]
    parts: list[list[list[Tensor]]] = [[] for _ in waves]
    states: dict[int, StreamState] = {}
    sizes = (3_000, 700, 1_900)
    for turn in range(60):
        if turn in (0, 2, 5):
            states[(0, 2, 5).index(turn)] = stream.start()
        rows = list(states)
        if not rows:
            continue
        pushed = [waves[row][(turn - (0, 2, 5)[row]) * sizes[row] :][: sizes[row]] for row in rows]
        joint, output = stream.push(join([states[row] for row in rows]), pushed)
        for place, (row, state) in enumerate(zip(rows, split(joint), strict=True)):
            length = int(output.lengths_B[place])
            parts[row].append([layer[place, :length] for layer in output.layers])
            states[row] = state
            if len(pushed[place]) < sizes[row]:
                _, last = stream.finish(states.pop(row))
                parts[row].append([layer[0] for layer in last.layers])
    assert not states
    for row, wave_T in enumerate(waves):
        found = [torch.cat(layers) for layers in zip(*parts[row], strict=True)]
        assert_equal(found, whole(model, wave_T, 4, left))


def test_a_state_is_not_changed_by_a_push() -> None:
    stream = StreamedModel(built("log_mel", "causal convolution"), 4, 2)
    state, _ = stream.push(stream.start(), speech_like(0.9, 0))
    first, second = (stream.push(state, speech_like(0.5, 1))[1].final.x_BFD for _ in range(2))
    assert len(first[0]) > 0
    assert torch.equal(first, second)


def test_the_size_of_a_state_is_constant() -> None:
    stream = StreamedModel(built("log_mel", "transformer"), 4, 2)
    state, sizes = stream.start(), []
    for _ in range(30):
        state, _ = stream.push(state, torch.zeros(4 * 640))
        sizes.append(state.bytes)
    assert len(set(sizes[1:])) == 1


def test_rows_can_be_taken_in_any_order() -> None:
    stream = StreamedModel(built("log_mel", "transformer"), 4, 2)
    state, _ = stream.push(stream.start(3), [speech_like(0.5, row) for row in range(3)])
    assert take(state, [2, 0]).samples == (state.samples[2], state.samples[0])
    assert torch.equal(take(state, [2]).encoder.blocks[0].keys_BHLC, state.encoder.blocks[0].keys_BHLC[2:])


@pytest.mark.parametrize(
    ("frontend", "encoder", "words"),
    [
        ({"name": "waveform_conv"}, {}, r"frontend\.norm=group: .*train with frontend\.norm=layer"),
        ({"name": "waveform_conv", "norm": "layer", "normalize": True}, {}, r"frontend\.normalize=true: mean and"),
        ({"name": "log_mel"}, {}, r"frontend\.normalize=utterance: statistics .*frontend\.normalize=fixed"),
        ({"name": "multiscale"}, {}, r"frontend\.normalize=utterance: statistics"),
        ({}, {"attention": "full"}, r"encoder\.attention=full: .*train with encoder\.attention=chunked"),
        ({}, {"attention": "local_global"}, r"encoder\.attention=local_global: windows are symmetric"),
        ({}, {"chunk_frames": [0]}, r"encoder\.chunk_frames=\[0\]: no chunk length"),
        ({}, {"positions": "conv"}, r"encoder\.positions=conv: its convolution is symmetric"),
        ({}, {"relative_bias": True}, r"encoder\.relative_bias=true"),
        ({}, {"name": "conformer"}, r"encoder\.causal=false: its convolution is symmetric"),
    ],
)
def test_what_cannot_stream_is_refused_by_name(frontend: dict[str, Any], encoder: dict[str, Any], words: str) -> None:
    plain: dict[str, Any] = {"positions": "rope"} | CHUNKED | encoder
    values = {
        "data": {"shards": "none"},
        "objective": small("objectives", "best_rq"),
        "frontend": frontend or FRONTENDS["log_mel"],
        "encoder": small("encoders", plain.pop("name", "transformer"), **plain),
    }
    with pytest.raises(ConfigError, match=words):
        StreamedModel(build_speech_model(load(Config, values)))


@pytest.mark.parametrize(
    ("chunk", "left", "words"),
    [(5, None, "chunk=5: the encoder was trained with 4, 6"), (4, 3, "left=3: .*trained with 2, 0, -1")],
)
def test_untrained_chunks_are_refused(chunk: int, left: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StreamedModel(built("log_mel", "transformer"), chunk, left)


def test_an_unlimited_left_context_ends_at_the_limit() -> None:
    stream = StreamedModel(built("log_mel", "transformer"), 4, -1, max_minutes=0.05)
    state, output = stream.push(stream.start(), torch.zeros(2 * 16_000))
    assert output.final.x_BFD.shape[1] > 40
    with pytest.raises(ConfigError, match=r"left=-1: .*max_minutes=0.05"):
        stream.push(state, torch.zeros(2 * 16_000))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 5), torch.zeros(5, dtype=torch.int16), torch.tensor([0.0, float("nan")])]
)
def test_samples_that_are_no_audio_are_refused(bad: Tensor) -> None:
    stream = StreamedModel(built("log_mel", "transformer"))
    with pytest.raises(ValueError, match="samples must be"):
        stream.push(stream.start(), [bad])
