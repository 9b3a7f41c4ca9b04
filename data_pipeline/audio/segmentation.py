"""Cuts a stream of audio into segments. Source times stay exact: `start` counts samples from the recording's begin."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.types import Span


def cut(blocks: Iterable[Wave], longest: int) -> Iterator[tuple[int, Wave, bool]]:
    """(start, wave, whole) pieces of at most `longest` samples, without gaps; `whole` where it is all of the recording.

    The last two pieces of a recording are of equal length, so that none is a short remainder. Holds at most
    2 · `longest` samples and one block.
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


def marked(blocks: Iterable[Wave], spans: Sequence[Span], longest: int) -> Iterator[tuple[Span, int, Wave, bool]]:
    """(span, start, wave, whole) for the stretches that the corpus marks; longer ones than `longest` are cut.

    Spans are sorted by start and may overlap; what lies beyond the recording's end is not there. Holds the audio of the
    first span that is open, and what overlaps it.
    """
    waiting, held, first = list(spans), np.zeros(0, np.float32), 0
    for block in itertools.chain(blocks, [None]):
        held = held if block is None else np.concatenate([held, block])
        while waiting and (block is None or waiting[0].stop <= first + len(held)):
            span = waiting.pop(0)
            wave = held[max(span.start - first, 0) : max(span.stop - first, 0)]
            if len(wave):
                yield from ((span, span.start + at, piece, whole) for at, piece, whole in cut([wave], longest))
        keep = waiting[0].start if waiting else first + len(held)
        if keep > first:
            gone = min(keep - first, len(held))
            held, first = held[gone:], first + gone
