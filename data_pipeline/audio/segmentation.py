"""Cuts a stream of audio into segments. Source times are exact: `start` counts samples from the recording's start."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.types import Span


def cut(blocks: Iterable[Wave], longest: int) -> Iterator[tuple[int, Wave, bool]]:
    """Cuts a recording into pieces of at most `longest` samples, without gaps.

    The last two pieces are of equal length, so that no short remainder is left. Keeps at most 2 · `longest` samples
    and one block in memory.

    Args:
        blocks: The recording, in blocks of any size.
        longest: Samples of the longest piece.

    Yields:
        (start, wave, whole): `start` in samples; `whole` is true for a piece that is the entire recording.
    """
    waiting: list[Wave] = []
    held = start = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        while held >= 2 * longest:
            whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            yield start, whole[:longest], False
            waiting, held, start = [whole[longest:]], held - longest, start + longest
    if not held:
        return
    whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
    if held <= longest:
        yield start, whole, start == 0
        return
    half = -(-held // 2)
    yield start, whole[:half], False
    yield start + half, whole[half:], False


def marked(
    blocks: Iterable[Wave], spans: Sequence[Span], longest: int, first: int = 0
) -> Iterator[tuple[Span, int, Wave, bool]]:
    """Cuts the spans that a corpus marks out of a recording. Spans may overlap; each gives its own pieces.

    Keeps the audio since the start of the oldest open span in memory, at most 2 · `longest` samples of it and one
    block.

    Args:
        blocks: The recording, in blocks of any size.
        spans: Spans in samples; one with `stop` None ends with the recording.
        longest: Samples of the longest piece; longer spans are cut as in `cut`.
        first: Number of the first sample of the blocks; no span begins before it.

    Yields:
        (span, start, wave, whole) in the order in which the pieces are complete, independent of the block size.
        `whole` is true for a piece that is its entire span, which the end of the recording may cut short. A span
        beyond the end of the recording yields nothing.
    """
    at = [span.start for span in spans]
    waiting = [(_next_cut(span, span.start, longest), number) for number, span in enumerate(spans)]
    heapq.heapify(waiting)
    held = np.zeros(0, np.float32)
    for block in itertools.chain(blocks, [None]):
        held = held if block is None else np.concatenate([held, block])
        end = first + len(held)
        while waiting and (block is None or waiting[0][0] <= end):
            place, number = heapq.heappop(waiting)
            span, start = spans[number], at[number]
            if place < (_END if span.stop is None else span.stop) and place <= end:
                yield span, start, held[start - first : start - first + longest], False
                at[number] = start + longest
                heapq.heappush(waiting, (_next_cut(span, at[number], longest), number))
                continue
            rest = held[start - first : min(place, end) - first] if start < end else held[:0]
            pieces = cut([rest], longest) if len(rest) else ()
            yield from ((span, start + offset, wave, whole and start == span.start) for offset, wave, whole in pieces)
        keep = min((at[number] for _, number in waiting), default=end)
        if keep > first:
            gone = min(keep - first, len(held))
            held, first = held[gone:], first + gone


_END: Final = 1 << 62


def _next_cut(span: Span, start: int, longest: int) -> int:
    """Returns the sample up to which audio is needed before the next piece of a span can be cut.

    Two pieces ahead, since the last two are made equally long (see `cut`).
    """
    return min(start + 2 * longest, _END if span.stop is None else span.stop)
