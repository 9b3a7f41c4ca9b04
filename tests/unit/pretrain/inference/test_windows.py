"""Long recordings in windows: the frames of one pass, in constant memory, cut in pauses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.inference.windows import Windows, cut_at_pauses, cut_at_quiet, join_windows

HOP = 4


def smoothed(wave_T: np.ndarray) -> np.ndarray:
    """A model whose frames see 8 samples to either side: (T,) to (F, 1)."""
    padded = np.pad(wave_T, 8)
    return np.stack([padded[f * HOP : f * HOP + 20].sum(keepdims=True) for f in range(len(wave_T) // HOP)] or [[0.0]])


@settings(max_examples=60, deadline=None)
@given(st.integers(HOP, 600), st.integers(1, 97), st.integers(6, 30))
def test_windows_give_the_frames_of_one_pass(length: int, block: int, seconds: int) -> None:
    wave = np.random.default_rng(length).standard_normal(length)
    windows = Windows.of(1.0, HOP, window_seconds=seconds, overlap_seconds=6)
    blocks = (wave[i : i + block] for i in range(0, length, block))
    joined = np.concatenate(list(join_windows(blocks, smoothed, windows)))
    np.testing.assert_allclose(joined, smoothed(wave), atol=1e-12)


def test_a_recording_of_one_window_is_computed_at_once() -> None:
    calls = []

    def compute(wave_T: np.ndarray) -> np.ndarray:
        calls.append(len(wave_T))
        return smoothed(wave_T)

    windows = Windows(HOP, 100, 16)
    list(join_windows([np.zeros(60), np.zeros(40)], compute, windows))
    assert calls == [100]
    list(join_windows([np.zeros(101)], compute, windows))
    assert calls[1:] == [100, 17]


def test_memory_does_not_grow_with_the_recording() -> None:
    held = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal held
        for _ in range(1000):
            held += 50
            yield np.zeros(50)

    most = 0
    for part in join_windows(blocks(), smoothed, Windows(HOP, 100, 16)):
        held -= len(part) * HOP
        most = max(most, held)
    assert most < 300


def test_frames_that_do_not_divide_the_audio_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number of samples"):
        Windows.of(30.0, 16_000, 30, 4)


def test_audio_is_cut_where_it_is_quietest() -> None:
    wave = np.ones(1_000, np.float32)
    wave[70:80] = wave[85:87] = wave[40:60] = wave[160:170] = 0.0
    pieces = list(cut_at_quiet(np.array_split(wave, 23), longest=100, searched=40, quiet=10))
    assert (np.concatenate(pieces) == wave).all()
    assert [len(piece) for piece in pieces[:2]] == [75, 90]
    assert max(map(len, pieces)) <= 100
    assert [len(piece) for piece in cut_at_quiet([wave[:60], wave[60:100]], 100, 40, 10)] == [100]


def test_pieces_are_cut_in_the_longest_pause_of_their_second_half() -> None:
    silent = np.zeros(60, bool)
    silent[3:9] = silent[12:14] = silent[15:19] = silent[35:37] = True
    frames = np.stack([silent, np.arange(60)], 1)
    pieces = list(cut_at_pauses([frames[:7], frames[7:45], frames[45:]], 20, lambda x: x[:, 0] > 0))
    assert [int(piece[0, 1]) for piece in pieces] == [0, 17, 36, 56]
    assert (np.concatenate(pieces) == frames).all()
    assert len(list(cut_at_pauses([frames[:9], frames[9:20]], 20, lambda x: x[:, 0] > 0))) == 1
