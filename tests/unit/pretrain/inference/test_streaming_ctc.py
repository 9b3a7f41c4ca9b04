"""Incremental decoding of CTC output equals decoding at once; segments end by the rules, wherever pushes end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.inference.ctc_decoding import Beams, BeamSearch, beam_search, greedy
from pretrain.inference.streaming_ctc import CTCDecoder, CTCSegment, CTCState
from pretrain.interfaces.decoding import EndPoints
from pretrain.nn.text_targets import BLANK

RATE = 25.0
SPACE = 1
NEVER = EndPoints(1e9, 1e9, 1e9)


def silent(log_probs_FV: np.ndarray) -> np.ndarray:
    return np.isin(log_probs_FV.argmax(1), [BLANK, SPACE])


def output(classes: list[int], seed: int = 0, sharp: float = 6.0) -> np.ndarray:
    """Returns ln p of five classes, (F, 5), with these most probable ones."""
    scores = np.random.default_rng(seed).standard_normal((len(classes), 5))
    scores[np.arange(len(classes)), classes] = scores.max(1) + sharp
    found: np.ndarray = (scores - np.log(np.exp(scores).sum(1, keepdims=True))).astype(np.float32)
    return found


def decode(decoder: CTCDecoder, frames_FV: np.ndarray, sizes: list[int]) -> tuple[list[CTCSegment], CTCState]:
    state, ended, at, turn = decoder.start(), [], 0, 0
    while at < len(frames_FV):
        state, new = decoder.push(state, frames_FV[at : at + sizes[turn % len(sizes)]])
        ended += new
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return ended + decoder.finish(state), state


classes_of = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(classes=classes_of, sizes=st.lists(st.integers(1, 9), min_size=1), sharp=st.sampled_from([0.0, 0.5, 4.0]))
def test_symbols_equal_those_of_all_frames_at_once(classes: list[int], sizes: list[int], sharp: float) -> None:
    frames_FV = output(classes, len(classes), sharp)
    for search in (None, BeamSearch(4)):
        decoder = CTCDecoder(RATE, silent, search, NEVER)
        _, state = decode(decoder, frames_FV, sizes)
        assert list(state.symbols) == (greedy(frames_FV) if search is None else beam_search(frames_FV, 4))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(classes=classes_of, seed=st.integers(0, 99), search=st.sampled_from([None, BeamSearch(3)]))
def test_the_stable_part_never_changes(classes: list[int], seed: int, search: BeamSearch | None) -> None:
    decoder = CTCDecoder(RATE, silent, search, NEVER)
    state, before = decoder.start(), ()
    for log_probs_V in output(classes, seed, sharp=0.3):
        state, _ = decoder.push(state, log_probs_V[None])
        assert state.symbols[: len(state.stable)] == state.stable
        assert state.stable[: len(before)] == before
        before = state.stable


def test_the_common_beginning_of_beams() -> None:
    paths = dict.fromkeys([(1, 2, 3), (1, 2), (1, 2, 0, 1)], (0.0, 0.0))
    assert Beams(paths, dict.fromkeys(paths, 0.0)).common == (1, 2)
    assert Beams.start().common == ()


WORDS = [2, 0, 3, 0, 0, 4, 4, 0]
PAUSE = [0] * round(1.2 * RATE)


@pytest.mark.parametrize("search", [None, BeamSearch(4)])
@pytest.mark.parametrize("sizes", [[1], [7], [10_000]])
def test_a_segment_ends_after_a_pause(search: BeamSearch | None, sizes: list[int]) -> None:
    decoder = CTCDecoder(RATE, silent, search)
    classes = [*WORDS, *PAUSE, *[0] * 200, *WORDS, *[0] * 20, *WORDS]
    segments, _ = decode(decoder, output(classes), sizes)
    assert [segment.symbols for segment in segments] == [(1, 2, 3), (1, 2, 3, 1, 2, 3)]
    first, second = segments
    assert first.first == 0
    assert len(first.log_probs_FV) == len(WORDS) - 1 + len(PAUSE)
    begin = classes.index(2, len(WORDS))
    assert second.first <= begin < second.first + 2.4 * RATE


def test_silence_keeps_the_state_small() -> None:
    decoder = CTCDecoder(RATE, silent)
    state, ended = decoder.push(decoder.start(), output([0] * 10_000))
    assert not ended
    assert len(state.frames) < 2.4 * RATE
    assert state.first + len(state.frames) == 10_000


@pytest.mark.parametrize("search", [None, BeamSearch(2)])
def test_a_long_segment_is_cut_in_its_longest_pause(search: BeamSearch | None) -> None:
    decoder = CTCDecoder(RATE, silent, search, EndPoints(longest_seconds=4.0))
    classes = [*[2, 0, 3] * 20, *[0] * 12, *[4, 0] * 30]
    segments, _ = decode(decoder, output(classes), [3])
    assert [segment.symbols for segment in segments] == [(1, 2) * 20, (3,) * 30]
    assert sum(len(segment.log_probs_FV) for segment in segments) == len(classes)
    assert segments[1].first == len(segments[0].log_probs_FV)


def test_without_any_pause_a_segment_is_cut_at_the_limit() -> None:
    decoder = CTCDecoder(RATE, silent, None, EndPoints(longest_seconds=2.0))
    segments, _ = decode(decoder, output([2, 3] * 60), [11])
    assert [len(segment.log_probs_FV) for segment in segments] == [50, 50, 20]
    assert sum((segment.symbols for segment in segments), ()) == (1, 2) * 60
