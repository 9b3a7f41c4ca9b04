"""Output of long recordings in overlapping windows, joined by times, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Windows of a recording. All lengths are samples, multiples of `hop`; `overlap` is an even number of hops.

    Neighbouring windows share `overlap` samples, and the join is in the middle of them: every frame that is kept was
    computed with at least overlap / 2 of audio on either side, except at the ends of the recording.
    """

    hop: int
    window: int
    overlap: int

    @staticmethod
    def of(rate_hz: float, sample_rate: int, window_seconds: float, overlap_seconds: float) -> Windows:
        """Returns windows of about these durations.

        Args:
            rate_hz: frames per second.
            sample_rate: samples per second.
            window_seconds: duration of a window.
            overlap_seconds: duration that neighbouring windows share.

        Raises:
            ValueError: frames are not a whole number of samples apart.
        """
        hop = round(sample_rate / rate_hz)
        if abs(hop * rate_hz - sample_rate) > 1e-6 * sample_rate:
            raise ValueError(f"frames at {rate_hz:g} Hz are not a whole number of samples apart")
        half = max(1, round(overlap_seconds * rate_hz / 2))
        return Windows(hop, max(round(window_seconds * rate_hz), 4 * half) * hop, 2 * half * hop)


def join_windows(
    blocks: Iterable[np.ndarray], compute: Callable[[np.ndarray], np.ndarray], windows: Windows
) -> Iterator[np.ndarray]:
    """Yields consecutive parts of a recording's frames.

    A recording of at most one window is computed at once, with the result of `compute` on all of it.

    Args:
        blocks: (T,) audio, block by block.
        compute: (T,) audio to (F, V) frames; frame f belongs to the samples from f · hop on.
        windows: where it is cut.

    Yields:
        (F, V) frames.
    """
    step, edge = windows.window - windows.overlap, windows.overlap // 2 // windows.hop
    waiting: list[np.ndarray] = []
    held, skip = 0, 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        if held <= windows.window:
            continue
        audio = np.concatenate(waiting)
        while len(audio) > windows.window:
            frames_FV = compute(audio[: windows.window])
            yield frames_FV[skip : windows.window // windows.hop - edge]
            audio, skip = audio[step:], edge
        waiting, held = [audio.copy()], len(audio)
    if held:
        yield compute(np.concatenate(waiting))[skip:]


def cut_at_pauses(
    parts: Iterable[np.ndarray], longest: int, silent: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the same frames in pieces of at most `longest`, cut in the longest pause of a piece's second half.

    Args:
        parts: (F, V) frames, part by part.
        longest: frames of a piece; frames that are no more than this stay in one piece.
        silent: (F, V) frames to (F,) bool: frames without a symbol.

    Yields:
        (F, V) frames.
    """
    return _cut(parts, longest, lambda frames_FV: longest_pause(silent(frames_FV)))


def cut_at_quiet(blocks: Iterable[np.ndarray], longest: int, searched: int, quiet: int) -> Iterator[np.ndarray]:
    """Yields the same audio in pieces of at most `longest` samples, cut where it is quietest.

    Args:
        blocks: (T,) audio, block by block.
        longest: samples of a piece; audio that is not longer stays in one piece.
        searched: the cut is in the last `searched` samples of a piece, at most `longest`.
        quiet: samples over which the power is averaged; the cut is in their middle.

    Yields:
        (T,) audio.
    """

    def place(audio_T: np.ndarray) -> int:
        sums = np.cumsum(np.square(audio_T[longest - searched :], dtype=np.float64))
        return longest - searched + int((sums[quiet:] - sums[:-quiet]).argmin()) + quiet // 2 + 1

    return _cut(blocks, longest, place)


def _cut(parts: Iterable[np.ndarray], longest: int, place: Callable[[np.ndarray], int]) -> Iterator[np.ndarray]:
    """Yields the same rows in pieces of at most `longest`; `place` gives the length of a piece from so many rows."""
    waiting: list[np.ndarray] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part)
        if held <= longest:
            continue
        rows = np.concatenate(waiting)
        while len(rows) > longest:
            cut = place(rows[:longest])
            yield rows[:cut]
            rows = rows[cut:]
        waiting, held = [rows.copy()], len(rows)
    if held:
        yield np.concatenate(waiting)


def longest_pause(silent_F: np.ndarray) -> int:
    """Returns the middle of the longest run of silent frames in the second half; its end without one."""
    first = len(silent_F) // 2
    padded = np.concatenate([[False], silent_F[first:], [False]]).astype(np.int8)
    begins, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    if not len(begins):
        return len(silent_F)
    longest = int((ends - begins).argmax())
    return max(1, first + int(begins[longest] + ends[longest] + 1) // 2)
