"""Transducer decoding: probabilities against the loss and enumeration; streams equal decoding at once; end points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.core.schema import load
from pretrain.heads.transducer import Config, Transducer, build, transducer_loss
from pretrain.inference.streaming_transducer import TransducerDecoder, TransducerState
from pretrain.interfaces.decoding import DecodedSegment, EndPoints
from pretrain.interfaces.models import ModelShape
from pretrain.nn.text_targets import BLANK

RATE = 25.0
SPACE = 0
NEVER = EndPoints(1e9, 1e9, 1e9)


def head(seed: int = 0, symbols: str = "ab") -> Transducer:
    """Returns an untrained transducer whose probabilities are far from uniform."""
    torch.manual_seed(seed)
    made = build(load(Config, {"name": "transducer", "symbols": symbols, "joint_dim": 8}), ModelShape(4, 1, 1, 1, 1))
    with torch.no_grad():
        made.output.weight *= 4
    return made.double().eval()


def lattice(made: Transducer, frames_FJ: np.ndarray, tokens: tuple[int, ...]) -> Tensor:
    """Returns ln p of the next class at each frame after each number of tokens, (F, N + 1, V)."""
    classes = [BLANK, BLANK, *(token + 1 for token in tokens)]
    contexts = torch.tensor([classes[n : n + 2] for n in range(len(tokens) + 1)])
    with torch.no_grad():
        return made.join(torch.from_numpy(frames_FJ)[:, None], made.predict(contexts)[None]).log_softmax(-1)


def by_enumeration(log_p_FNV: Tensor, tokens: tuple[int, ...], most: int) -> float:
    """Returns the summed probability of all ways to emit the tokens, at most `most` at a frame."""
    n_frames, total = len(log_p_FNV), 0.0
    for counts in itertools.product(range(most + 1), repeat=n_frames):
        if sum(counts) == len(tokens):
            score, n = 0.0, 0
            for frame, count in enumerate(counts):
                for _ in range(count):
                    score, n = score + float(log_p_FNV[frame, n, tokens[n] + 1]), n + 1
                score += float(log_p_FNV[frame, n, BLANK])
            total += math.exp(score)
    return total


def frames_of(seed: int, n_frames: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_frames, width))


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_everything_has_the_probability_of_every_text(seed: int) -> None:
    made, frames_FJ = head(seed), frames_of(seed, 3)
    decoder = TransducerDecoder(RATE, made, beam=10_000, end_points=NEVER, most_per_frame=2)
    state, _ = decoder.push(decoder.start(), frames_FJ)
    found = {hypothesis.tokens: hypothesis.log_prob for hypothesis in state.hypotheses}
    texts = [text for length in range(7) for text in itertools.product(range(2), repeat=length)]
    assert found.keys() == set(texts)
    expected = {text: by_enumeration(lattice(made, frames_FJ, text), text, most=2) for text in texts}
    assert all(math.exp(found[text]) == pytest.approx(expected[text], rel=1e-9) for text in texts)
    assert state.symbols == max(expected, key=lambda text: expected[text])
    for text in texts:
        if len(text) <= 2:  # no frame can have more than two tokens: the loss's sum over all paths
            log_p_FNV = lattice(made, frames_FJ, text)
            token_FN = torch.stack([log_p_FNV[:, n, token + 1] for n, token in enumerate(text)], 1) if text else None
            token_1FN = torch.zeros(1, 3, 0, dtype=torch.float64) if token_FN is None else token_FN[None]
            loss = transducer_loss(
                log_p_FNV[None, :, :, BLANK], token_1FN, torch.tensor([3]), torch.tensor([len(text)])
            )
            assert found[text] == pytest.approx(-float(loss), abs=1e-9)


def test_greedy_decoding_takes_the_likeliest_class_until_a_blank() -> None:
    made, frames_FJ = head(1, "abc"), frames_of(1, 40)
    tokens: list[int] = []
    expected: list[tuple[int, int]] = []
    for frame in range(len(frames_FJ)):
        for _ in range(3):
            best = int(lattice(made, frames_FJ[frame : frame + 1], tuple(tokens))[0, -1].argmax())
            if best == BLANK:
                break
            tokens.append(best - 1)
            expected.append((best - 1, frame))
    decoder = TransducerDecoder(RATE, made, end_points=NEVER, most_per_frame=3)
    state, _ = decoder.push(decoder.start(), frames_FJ)
    [segment] = decoder.finish(state)
    assert [
        (token, aligned.start) for token, aligned in zip(tokens, segment.align(tuple(tokens)), strict=True)
    ] == expected
    assert len({token for token, _ in expected}) > 1
    assert any(one == other for one, other in itertools.pairwise(frame for _, frame in expected))


class Spoken:
    """A joiner whose frames are logits of the classes; a token does not follow itself at once."""

    context = 1

    def predict(self, classes_NC: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(classes_NC[:, -1], 5).double()

    def join(self, frame_NJ: Tensor, token_NJ: Tensor) -> Tensor:
        repeats = token_NJ.clone()
        repeats[:, BLANK] = 0
        return frame_NJ - 50 * repeats


def output(classes: list[int], seed: int = 0, sharp: float = 8.0) -> np.ndarray:
    """Returns logits of five classes, (F, 5), with these likeliest, and the blank second."""
    scores = np.random.default_rng(seed).standard_normal((len(classes), 5))
    scores[:, BLANK] = scores.max(1) + sharp
    scores[np.arange(len(classes)), classes] += 2 * sharp
    return scores


def decode(
    decoder: TransducerDecoder, frames_FJ: np.ndarray, sizes: list[int]
) -> tuple[list[DecodedSegment], TransducerState]:
    state, ended, at, turn = decoder.start(), list[DecodedSegment](), 0, 0
    while at < len(frames_FJ):
        state, new = decoder.push(state, frames_FJ[at : at + sizes[turn % len(sizes)]])
        ended += new
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return ended + decoder.finish(state), state


def texts(segments: list[DecodedSegment]) -> list[tuple[int, ...]]:
    return [segment.candidates[0].symbols for segment in segments]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=1), beam=st.sampled_from([0, 3]))
def test_the_result_does_not_depend_on_the_sizes_of_pushes(seed: int, sizes: list[int], beam: int) -> None:
    made, frames_FJ = head(seed, "ab c"), frames_of(seed, 40)
    decoder = TransducerDecoder(RATE, made, spaces=frozenset({2}), beam=beam, end_points=EndPoints(1.0, 0.2, 0.8))
    (ended, state), (expected, whole) = decode(decoder, frames_FJ, sizes), decode(decoder, frames_FJ, [40])
    assert ended == expected
    assert state == whole


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), beam=st.sampled_from([0, 1, 4]))
def test_the_stable_part_never_changes(seed: int, beam: int) -> None:
    decoder = TransducerDecoder(RATE, head(seed, "abc"), beam=beam, end_points=NEVER)
    state, before = decoder.start(), ()
    for frame_J in frames_of(seed, 30):
        state, _ = decoder.push(state, frame_J[None])
        assert state.symbols[: len(state.stable)] == state.stable
        assert state.stable[: len(before)] == before
        before = state.stable
    if not beam:
        assert before == state.symbols


WORDS = [2, 0, 3, 0, 0, 4, 2, 0]
PAUSE = [0] * round(1.2 * RATE)


@pytest.mark.parametrize("beam", [0, 4])
@pytest.mark.parametrize("sizes", [[1], [10_000]])
def test_a_segment_ends_after_a_pause(beam: int, sizes: list[int]) -> None:
    decoder = TransducerDecoder(RATE, Spoken(), spaces=frozenset({SPACE}), beam=beam)
    classes = [*WORDS, *PAUSE, *[0] * 100, *WORDS, *[0, 1] * 10, *WORDS]
    segments, _ = decode(decoder, output(classes), sizes)
    assert texts(segments) == [(1, 2, 3, 1), (1, 2, 3, 1, SPACE, 1, 2, 3, 1)]
    first, second = segments
    assert (first.first, first.n_frames) == (0, len(WORDS) - 1 + len(PAUSE))
    assert [aligned.start for aligned in first.align((1, 2, 3, 1))] == [0, 2, 5, 6]
    begin = classes.index(2, len(WORDS))
    assert second.first + second.align(second.candidates[0].symbols)[0].start == begin


def test_spaces_do_not_interrupt_a_pause() -> None:
    decoder = TransducerDecoder(RATE, Spoken(), spaces=frozenset({SPACE}))
    segments, _ = decode(decoder, output([2, *[0] * 20, 1, *[0] * 20, 3]), [5])
    assert texts(segments) == [(1, SPACE), (2,)]


def test_silence_keeps_the_state_small() -> None:
    decoder = TransducerDecoder(RATE, Spoken())
    state, ended = decoder.push(decoder.start(), output([0] * 1_000))
    assert not ended
    assert state.n_frames < 2.4 * RATE
    assert state.first + state.n_frames == 1_000
    assert state.bytes < 100


@pytest.mark.parametrize("beam", [0, 2])
def test_a_long_segment_is_cut_in_its_longest_pause(beam: int) -> None:
    decoder = TransducerDecoder(RATE, Spoken(), beam=beam, end_points=EndPoints(longest_seconds=4.0))
    classes = [*[2, 0, 3] * 20, *[0] * 12, *[4, 0, 2] * 20]
    segments, _ = decode(decoder, output(classes), [3])
    assert texts(segments) == [(1, 2) * 20, (3, 1) * 20]
    assert segments[1].first == segments[0].n_frames
    assert [aligned.start + segments[1].first for aligned in segments[1].align((3, 1) * 20)] == [
        place for place, found in enumerate(classes) if place >= 72 and found
    ]


def test_an_untrained_predictor_cannot_loop() -> None:
    made = head(0)
    with torch.no_grad():
        made.output.bias[BLANK] = -100.0
    decoder = TransducerDecoder(RATE, made, end_points=NEVER, most_per_frame=4)
    state, _ = decoder.push(decoder.start(), frames_of(0, 3))
    assert len(state.symbols) == 12
